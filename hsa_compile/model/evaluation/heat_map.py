"""Pictures of results: accuracy by length and depth, perplexity by context length."""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hsa_compile.files import replace_file
from hsa_compile.model.evaluation.perplexity import Perplexity
from hsa_compile.model.evaluation.results import Cell, Results, depth_label
from hsa_compile.model.evaluation.settings import length_label
from hsa_compile.versions import require

PERPLEXITY_PICTURE = "ppl.png"
_LETTERS_PER_INCH = 9  # how many letters of a title fit in an inch


def draw(results: Results, directory: Path) -> list[Path]:
    """Writes `TASK-HAYSTACK.png`, a panel for each protocol, and `ppl.png`, where there is anything to show.

    Raises:
        MissingDependency: matplotlib is not installed.
        SaveError: a file cannot be written.
    """
    require("matplotlib", "a picture").use("Agg")
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in results.cells:
        if cell.depth is not None:
            groups.setdefault((cell.task, cell.haystack), []).append(cell)
    paths = []
    for (task, haystack), cells in groups.items():
        figure = _heat_map(f"{results.model}: {task} in {haystack}", cells)
        paths.append(_save(figure, directory / f"{task}-{re.sub(r'[^A-Za-z0-9_.-]+', '_', haystack)}.png"))
    if results.perplexities:
        figure = _curve(results.model, results.perplexities)
        paths.append(_save(figure, directory / PERPLEXITY_PICTURE))
    return paths


def _heat_map(title: str, cells: Sequence[Cell]) -> Any:
    from matplotlib import pyplot

    protocols = list(dict.fromkeys(cell.protocol for cell in cells))
    lengths = sorted({cell.length for cell in cells})
    depths = sorted({cell.depth for cell in cells if cell.depth is not None})
    figure, panels = pyplot.subplots(
        1,
        len(protocols),
        squeeze=False,
        figsize=(1.6 + len(protocols) * max(3.6, 0.75 * len(lengths) + 1), max(2.8, 0.5 * len(depths) + 1.6)),
        layout="constrained",
    )
    for panel, protocol in zip(panels[0], protocols, strict=True):
        shares = [[float("nan")] * len(lengths) for _ in depths]
        for cell in cells:
            if cell.protocol == protocol and cell.depth is not None:
                row, column = depths.index(cell.depth), lengths.index(cell.length)
                shares[row][column] = 100 * cell.accuracy
                color = "black" if 0.2 < cell.accuracy < 0.9 else "white"  # whether the ground is light or dark
                panel.text(column, row, f"{shares[row][column]:.0f}", ha="center", va="center", color=color)
        image = panel.imshow(shares, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
        panel.set_xticks(range(len(lengths)), [length_label(length) for length in lengths])
        panel.set_yticks(range(len(depths)), [depth_label(depth) for depth in depths])
        panel.set_xlabel("length in bytes")
        panel.set_title(protocol)
    panels[0][0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=panels[0].tolist(), label="right answers, %")
    counts = sorted({cell.num_samples for cell in cells})
    title = f"{title}, {' or '.join(map(str, counts))} {'sample' if counts == [1] else 'samples'} a cell"
    figure.suptitle(textwrap.fill(title, int(_LETTERS_PER_INCH * figure.get_figwidth())))
    return figure


def _curve(model: str, perplexities: Sequence[Perplexity]) -> Any:
    from matplotlib import pyplot

    first = perplexities[0]
    lengths = [each.length for each in perplexities]
    figure, panel = pyplot.subplots(figsize=(7, 4), layout="constrained")
    errors = [each.standard_error or 0.0 for each in perplexities]
    panel.errorbar(lengths, [each.perplexity for each in perplexities], yerr=errors, marker="o", capsize=3)
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [length_label(length) for length in lengths])
    panel.minorticks_off()
    panel.set_ylim(0, 1.1 * max(each.perplexity + (each.standard_error or 0.0) for each in perplexities))
    panel.set_xlabel("context in tokens")
    panel.set_ylabel(f"perplexity of the last {first.num_scored} tokens")
    texts = "1 text" if first.num_texts == 1 else f"{first.num_texts} texts"
    title = f"{model}: held-out {first.source}, {texts}, ± standard error"
    panel.set_title(textwrap.fill(title, int(_LETTERS_PER_INCH * figure.get_figwidth())))
    panel.grid(alpha=0.3)
    return figure


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))
    pyplot.close(figure)
    return path
