"""Draws the pictures of the lessons in docs/: what sees what, what that costs, and how dataflows walk.

python benchmarks/lesson_pictures.py docs/pictures
"""

import math
from collections.abc import Iterator
from pathlib import Path

import click
import torch

from hsa_compile import select_chunks_reference

TOKENS, CHUNK, PICKS, WINDOW = 32, 4, 2, 6  # of the small text in the pictures
INK, SOFT, GRID, NEAR, FAR, OURS = "#222222", "#555555", "#dddddd", "#9ecae1", "#b9c4cc", "#1f77b4"
CELL, WIDTH = 9, 1040
LENGTHS = [2**power for power in range(10, 25)]  # 1K to 16M


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    """Writes all pictures into FOLDER as SVG."""
    for name, text in pictures().items():
        (folder / name).write_text(text, encoding="utf-8")


def pictures() -> dict[str, str]:
    """The name of each picture, and the picture."""
    return {"who_sees_what.svg": who_sees_what(), "keys_a_token.svg": keys_a_token(), "dataflows.svg": dataflows()}


def picks() -> list[list[int]]:
    """The chunks that each token of the small text picks, by the definition of the op; the scores are random."""
    generator = torch.Generator().manual_seed(5)
    query, landmarks = (
        torch.randn(1, n, 1, 8, generator=generator, dtype=torch.float64) for n in (TOKENS, TOKENS // CHUNK)
    )
    indices, _ = select_chunks_reference(query, landmarks, chunk_size=CHUNK, top_k=PICKS)
    return [[chunk for chunk in row if chunk >= 0] for row in indices[0, :, 0].tolist()]


def who_sees_what() -> str:
    """Three grids of tokens and keys: dense attention, a sliding window, and chunks that are picked beside a window."""
    chosen = picks()
    near = {(t, s) for t in range(TOKENS) for s in range(max(0, t - WINDOW + 1), t + 1)}
    far = {(t, c * CHUNK + i) for t, row in enumerate(chosen) for c in row for i in range(CHUNK)}
    earlier = {(t, s) for t in range(TOKENS) for s in range(t + 1)}
    window = dict.fromkeys(near, NEAR)
    grids = [
        ("Dense attention", "each token sees every earlier key", dict.fromkeys(earlier, FAR)),
        ("A sliding window", "each token sees its neighbours", window),
        ("HSA beside a window", "its neighbours, and two chunks that it picked", window | dict.fromkeys(far, OURS)),
    ]
    lines, size = [], TOKENS * CELL
    for number, (title, what, cells) in enumerate(grids):
        x, y = 60 + number * 330, 74
        lines += [_text(x, 30, title, size=17, weight="bold"), _text(x, 52, what, fill=SOFT)]
        lines += [_cell(x + s * CELL, y + t * CELL, colour) for (t, s), colour in sorted(cells.items())]
        lines += _frame(x, y, size)
        lines.append(_text(x + size // 2, y + size + 20, f"keys, in chunks of {CHUNK}", anchor="middle", fill=SOFT))
    lines.append(_text(40, 74 + size // 2, "tokens", anchor="middle", fill=SOFT, turned=True))
    return _svg(400, "Which keys each token sees: in dense attention, in a sliding window, in HSA", lines)


def keys_a_token(chunk: int = 64, picked: int = 16) -> str:
    """How many keys and landmarks the last token of a text looks at, by the length of the text."""
    left, top, width, height = 90, 40, 660, 300
    most = math.log2(LENGTHS[-1])

    def place(length: float, count: float) -> tuple[float, float]:
        across = math.log2(length / LENGTHS[0]) / math.log2(LENGTHS[-1] / LENGTHS[0])
        return left + across * width, top + height - math.log2(count) / most * height

    curves = [
        ("dense attention", "every key", INK, lambda n: n),
        ("HSA, choosing", f"a landmark for each {chunk} keys", NEAR, lambda n: n / chunk),
        ("HSA, attending", f"{picked} chunks of {chunk} keys", OURS, lambda n: min(n, picked * chunk)),
    ]
    lines = []
    for power in range(0, 25, 4):
        y = place(LENGTHS[0], 2**power)[1]
        lines.append(f'<path d="M{left} {y:.1f}H{left + width}" stroke="{GRID}"/>')
        lines.append(_text(left - 8, round(y) + 4, _short(2**power), anchor="end", fill=SOFT))
    for length in LENGTHS[::2]:
        lines.append(_text(round(place(length, 1)[0]), top + height + 20, _short(length), anchor="middle", fill=SOFT))
    for name, what, colour, count in curves:
        points = [place(length, count(length)) for length in LENGTHS]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        lines.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="3"/>')
        lines.append(_text(left + width + 10, round(points[-1][1]) + 4, name, weight="bold"))
        lines.append(_text(left + width + 10, round(points[-1][1]) + 22, what, fill=SOFT))
    below = "length of the text in tokens; both scales are logarithmic"
    lines.append(_text(left + width // 2, top + height + 44, below, anchor="middle", fill=SOFT))
    lines.append(_text(left, 24, "How many keys or landmarks the last token looks at", size=17, weight="bold"))
    return _svg(400, "How many keys a token looks at, by the length of the text: dense attention and HSA", lines)


def dataflows() -> str:
    """The grid of tokens and chunks with its picks, and the order in which three dataflows walk through them."""
    chosen = [row for row in picks() if len(row) == PICKS][::3][:8]
    walks = {
        "token": "a program owns a row, one token",
        "chunk": "a program owns a column, one chunk",
        "slot": "a block of tokens, first pick 1, then pick 2",
    }
    lines, cell, size = [], 30, TOKENS // CHUNK * 30
    for number, (name, what) in enumerate(walks.items()):
        x, y = 60 + number * 330, 74
        lines += [_text(x, 30, name, size=17, weight="bold"), _text(x, 52, what, fill=SOFT)]
        for t, row in enumerate(chosen):
            for slot, chunk in enumerate(row):
                left, top, colour = x + chunk * cell, y + t * cell, (OURS, NEAR)[slot if name == "slot" else 0]
                lines.append(_cell(left, top, colour, cell))
                if name == "slot":
                    fill = ("#ffffff", INK)[slot]
                    lines.append(_text(left + 15, top + 20, str(slot + 1), anchor="middle", fill=fill, weight="bold"))
        lines += _frame(x, y, size, cell)
        for place in range(15, size, cell):
            start = {"token": f"{x + 4} {y + place}h", "chunk": f"{x + place} {y + 4}v"}.get(name)
            if start:
                lines.append(f'<path d="M{start}{size - 12}" stroke="{INK}" stroke-width="2" marker-end="url(#to)"/>')
        lines.append(_text(x + size // 2, y + size + 20, "chunks", anchor="middle", fill=SOFT))
    lines.append(_text(40, 74 + size // 2, "tokens", anchor="middle", fill=SOFT, turned=True))
    return _svg(350, "Three dataflows walk the grid of tokens and chunks: by row, by column, by slot", lines)


def _short(count: int) -> str:
    units = ((1 << 20, "M"), (1 << 10, "K"))
    return next((f"{count // size}{unit}" for size, unit in units if count >= size), str(count))


def _frame(x: int, y: int, size: int, step: int = CELL * CHUNK) -> Iterator[str]:
    for place in range(0, size + 1, step):
        yield f'<path d="M{x + place} {y}v{size}" stroke="{GRID}"/>'
    for place in (0, size):
        yield f'<path d="M{x} {y + place}h{size}" stroke="{GRID}"/>'


def _cell(x: int, y: int, colour: str, size: int = CELL) -> str:
    return f'<rect x="{x + 1}" y="{y + 1}" width="{size - 2}" height="{size - 2}" fill="{colour}"/>'


def _text(
    x: int,
    y: int,
    text: str,
    *,
    size: int = 13,
    anchor: str = "start",
    fill: str = INK,
    weight: str = "normal",
    turned: bool = False,
) -> str:
    turn = f' transform="rotate(-90 {x} {y})"' if turned else ""
    style = f'font-size="{size}" text-anchor="{anchor}" fill="{fill}" font-weight="{weight}"'
    return f'<text x="{x}" y="{y}" {style}{turn}>{text}</text>'


def _svg(height: int, title: str, lines: list[str]) -> str:
    body = "\n".join(f"  {line}" for line in lines)
    arrow = '<marker id="to" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="5" markerHeight="5" orient="auto">'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        "font-family=\"Helvetica, Arial, 'DejaVu Sans', sans-serif\">\n"
        f'  <title>{title}</title>\n  <defs>{arrow}<path d="M0 0L8 4L0 8Z"/></marker></defs>\n'
        f'  <rect width="{WIDTH}" height="{height}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    main()
