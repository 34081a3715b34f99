"""The README's picture of speed, from the committed results of a CPU and of an H100.

python benchmarks/speed_picture.py docs/pictures/speed.svg
"""

import json
from collections.abc import Iterator
from pathlib import Path

import click

RESULTS = Path(__file__).parent / "results"
H100 = "One H100: 65,536 tokens, 32 query heads, 2 key/value heads of width 128, bfloat16, 16 picked chunks of 64"
CPU = "Two CPU cores: 16,384 tokens, 16 query heads, 1 key/value head of width 64, float32, 8 picked chunks of 64"
OURS, TUNED = "hsa-compile", "hsa-compile, tuned"
NAMES = {
    "gather": "gathered in PyTorch",
    "SDPA": "PyTorch SDPA, dense",
    "the authors' Triton kernels": "authors' Triton kernels",
}
PASSES = {"forward": "forward_ms", "forward + backward": "forward_backward_ms"}
KINDS = {"forward": "forward", "forward + backward": "both"}
Bars = list[tuple[str, float]]  # who, and its milliseconds

WIDTH, LABEL, BAR, STEP, TOP = 1040, 172, 250, 26, 58
COLOURS = {True: "#1f77b4", False: "#b9c4cc"}


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def main(file: Path) -> None:
    """Writes the picture to FILE as SVG."""
    file.write_text(picture(), encoding="utf-8")


def panels() -> dict[tuple[str, str], Bars]:
    """Device and shape, and the pass → the contenders with their times, ours first."""
    h100 = json.loads((RESULTS / "attention_h100.json").read_text(encoding="utf-8"))["results"]
    shape = {"seq_len": 65536, "num_kv_heads": 2, "picks": "random"}
    timed = [row for row in h100 if shape.items() <= row.items() and row["contender"] != TUNED]
    cpu = json.loads((RESULTS / "bench_cpu_2_cores.json").read_text(encoding="utf-8"))["results"]
    long = [row for row in cpu if row["problem"]["seq_len"] == 16384 and row["contender"] in (OURS, "gather", "SDPA")]
    found = {}
    for title, field in PASSES.items():
        found[H100, title] = _sorted({row["contender"]: row[field] for row in timed})
        timed_here = [row for row in long if row["kind"] == KINDS[title]]
        found[CPU, title] = _sorted({row["contender"]: row["measurement"]["median_ms"] for row in timed_here})
    return {(device, title): found[device, title] for device in (H100, CPU) for title in PASSES}


def _sorted(times: dict[str, float]) -> Bars:
    bars = [(NAMES.get(name, name), time) for name, time in times.items()]
    return sorted(bars, key=lambda bar: (bar[0] != OURS, bar[1]))


def picture() -> str:
    """The SVG: two devices below each other, two passes side by side, a bar a contender."""
    everything = panels()
    rows = [max(len(everything[device, title]) for title in PASSES) for device in (H100, CPU)]
    tops = [0, TOP + rows[0] * STEP + 22]
    height = tops[1] + TOP + rows[1] * STEP + 12
    lines = []
    for (device, title), bars in everything.items():
        x, y = list(PASSES).index(title) * (WIDTH // 2), tops[(H100, CPU).index(device)]
        if x == 0:
            lines.append(_text(16, y + 24, device, size=14, weight="bold"))
        lines.append(_text(x + 16 + LABEL, y + 46, f"{title}, ms", size=13, fill="#555555"))
        lines += _bars(x + 16, y + TOP, bars)
    body = "\n".join(f"  {line}" for line in lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        "font-family=\"Helvetica, Arial, 'DejaVu Sans', sans-serif\">\n"
        "  <title>Time of attention forward and with backward, on an H100 and on two CPU cores</title>\n"
        f'  <rect width="{WIDTH}" height="{height}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def _bars(x: int, y: int, bars: Bars) -> Iterator[str]:
    longest = max(time for _, time in bars)
    for number, (name, time) in enumerate(bars):
        top, ours = y + number * STEP, name == OURS
        width = max(1, round(BAR * time / longest))
        weight = "bold" if ours else "normal"
        yield _text(x + LABEL - 8, top + 14, name, anchor="end", weight=weight)
        yield f'<rect x="{x + LABEL}" y="{top}" width="{width}" height="19" fill="{COLOURS[ours]}"/>'
        yield _text(x + LABEL + width + 6, top + 14, milliseconds(time), weight=weight)


def milliseconds(time: float) -> str:
    """Three digits, or all that stand before the point."""
    return f"{time:.1f}" if time < 100 else f"{time:,.0f}"


def _text(
    x: int, y: int, text: str, *, size: int = 13, anchor: str = "start", fill: str = "#222222", weight: str = "normal"
) -> str:
    place = f'x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text {place} fill="{fill}" font-weight="{weight}">{text}</text>'


if __name__ == "__main__":
    main()
