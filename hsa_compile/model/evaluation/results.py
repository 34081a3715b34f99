"""What an evaluation found: shares of right answers with their intervals, and perplexities, as JSON, CSV and text."""

import csv
import itertools
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tabulate

from hsa_compile.files import replace_file, write_json
from hsa_compile.markup import escaped
from hsa_compile.model.config import PERPLEXITY, PROTOCOLS
from hsa_compile.model.evaluation.outcomes import OutcomeFile
from hsa_compile.model.evaluation.perplexity import Perplexity
from hsa_compile.model.evaluation.settings import RetrievalSettings, haystack_key, length_label, sample_key
from hsa_compile.model.evaluation.subject import Subject
from hsa_compile.model.tasks.haystack import Haystack
from hsa_compile.versions import require

_Z = 1.959963984540054  # standard deviations that a 95 % interval reaches to each side
JSON_FILE, CSV_FILE = "results.json", "results.csv"
_COLUMNS = (
    "model", "task", "haystack", "protocol", "length", "depth", "samples", "correct", "accuracy", "low", "high",
    "perplexity", "standard_error", "bits_per_byte", "change", "change_error",
)  # fmt: skip


def wilson_interval(num_correct: int, num_samples: int) -> tuple[float, float]:
    """Returns Wilson's 95 % interval (1927) for a share; it is right for few samples and for shares of 0 and 1 too.

    Args:
        num_correct: how many were right, from 0 to the number of samples.
        num_samples: how many there are, 1 or more.
    """
    assert 0 <= num_correct <= num_samples > 0, (num_correct, num_samples)
    share, z2 = num_correct / num_samples, _Z**2
    middle = share + z2 / (2 * num_samples)
    half = _Z * math.sqrt(share * (1 - share) / num_samples + z2 / (4 * num_samples**2))
    scale = 1 + z2 / num_samples
    low = 0.0 if num_correct == 0 else (middle - half) / scale
    high = 1.0 if num_correct == num_samples else (middle + half) / scale
    return low, high


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The share of right answers among samples of one kind.

    Attributes:
        task, haystack, protocol, length: what its samples have in common.
        depth: where their first asked needle lies; None for all depths together.
        num_samples, num_correct: how many samples there are, and how many were answered right.
    """

    task: str
    haystack: str
    protocol: str
    length: int
    depth: float | None
    num_samples: int
    num_correct: int

    @property
    def accuracy(self) -> float:
        """The share of samples whose every answer was right."""
        return self.num_correct / self.num_samples

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the accuracy."""
        return wilson_interval(self.num_correct, self.num_samples)


def retrieval_cells(
    subject: Subject, settings: RetrievalSettings, haystack: Haystack, outcomes: OutcomeFile
) -> list[Cell]:
    """Returns the cells all of whose samples are in the file; behind those of a length, all its depths together."""
    common = subject.key() | haystack_key(haystack)
    cells = []
    for task, protocol, length in itertools.product(settings.tasks, settings.protocols, settings.lengths):
        by_depth: dict[float | None, list[bool]] = {}
        for depth in settings.depths:
            keys = (
                sample_key(settings, common, task, length, depth, index, protocol)
                for index in range(settings.num_samples)
            )
            found = [bool(values["correct"]) for key in keys if (values := outcomes.get(key)) is not None]
            if len(found) == settings.num_samples:
                by_depth[depth] = found
        if by_depth:
            by_depth[None] = [correct for found in by_depth.values() for correct in found]
        cells += [
            Cell(
                task=task,
                haystack=haystack.name,
                protocol=protocol,
                length=length,
                depth=depth,
                num_samples=len(found),
                num_correct=sum(found),
            )
            for depth, found in by_depth.items()
        ]
    return cells


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What an evaluation found.

    Attributes:
        model: the model's name.
        settings: plain values: the model's key, and what was asked.
        cells: the results of the retrieval tasks.
        perplexities: the perplexities by context length.
    """

    model: str
    settings: dict[str, Any]
    cells: tuple[Cell, ...] = ()
    perplexities: tuple[Perplexity, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values; a cell whose depth is None holds all depths."""
        used = dict.fromkeys(cell.protocol for cell in self.cells)
        return {
            "model": self.model,
            "settings": self.settings,
            "protocols": {name: PROTOCOLS[name] for name in used},
            "retrieval": [_cell_values(cell) for cell in self.cells],
            "perplexity": [asdict(each) for each in self.perplexities],
        }

    def write(self, directory: Path) -> list[Path]:
        """Writes `results.json` and `results.csv`, each as a whole or not at all.

        Raises:
            SaveError: a file cannot be written.
        """
        paths = [directory / JSON_FILE, directory / CSV_FILE]
        write_json(paths[0], self.to_dict())
        replace_file(paths[1], self._write_csv)
        return paths

    def tables(self) -> list[str]:
        """Returns a table for each task, haystack and protocol, by length and depth, and a table of perplexities."""
        groups: dict[tuple[str, str, str], list[Cell]] = {}
        for cell in self.cells:
            groups.setdefault((cell.task, cell.haystack, cell.protocol), []).append(cell)
        tables = [
            f"{task} in {haystack}, {protocol}\n{_table(cells)}" for (task, haystack, protocol), cells in groups.items()
        ]
        if self.perplexities:
            tables.append(_perplexity_table(self.perplexities))
        return tables

    def _repr_html_(self) -> str:
        """Returns the same tables, for a notebook."""
        return "".join(f"<pre>{escaped(table)}</pre>\n" for table in self.tables())

    def _write_csv(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _COLUMNS, restval="", lineterminator="\n")
            writer.writeheader()
            for cell in self.cells:
                values = _cell_values(cell)
                writer.writerow({"model": self.model} | values | {"depth": "all" if cell.depth is None else cell.depth})
            for each in self.perplexities:
                writer.writerow(
                    {
                        "model": self.model,
                        "task": PERPLEXITY,
                        "haystack": each.text,
                        "length": each.length,
                        "samples": each.num_texts,
                        "perplexity": each.perplexity,
                        "standard_error": "" if each.standard_error is None else each.standard_error,
                        "bits_per_byte": each.bits_per_byte,
                        "change": each.change,
                        "change_error": "" if each.change_error is None else each.change_error,
                    }
                )


def depth_label(depth: float) -> str:
    """Writes 0.25 as `25 %`."""
    return f"{100 * depth:.4g} %"


def _cell_values(cell: Cell) -> dict[str, Any]:
    low, high = cell.interval
    return {
        "task": cell.task,
        "haystack": cell.haystack,
        "protocol": cell.protocol,
        "length": cell.length,
        "depth": cell.depth,
        "samples": cell.num_samples,
        "correct": cell.num_correct,
        "accuracy": cell.accuracy,
        "low": low,
        "high": high,
    }


def _table(cells: Sequence[Cell]) -> str:
    depths = sorted({cell.depth for cell in cells if cell.depth is not None})
    rows = []
    for length in dict.fromkeys(cell.length for cell in cells):
        of_length = {cell.depth: cell for cell in cells if cell.length == length}
        every = of_length[None]
        low, high = every.interval
        shares = [f"{100 * of_length[depth].accuracy:.0f}" if depth in of_length else "" for depth in depths]
        rows.append(
            [length_label(length), *shares, f"{100 * every.accuracy:.1f}", f"{100 * low:.1f} – {100 * high:.1f}",
             every.num_samples]
        )  # fmt: skip
    headers = ["length", *(f"at {depth_label(depth)}" for depth in depths), "all", "95 % interval", "samples"]
    return tabulate.tabulate(rows, headers=headers, disable_numparse=True, stralign="right")


def _perplexity_table(perplexities: Sequence[Perplexity]) -> str:
    first = perplexities[0]
    rows = [
        [
            length_label(each.length),
            f"{each.perplexity:.4g}",
            "" if each.standard_error is None else f"{each.standard_error:.2g}",
            f"{each.bits_per_byte:.4f}",
            _change(each) if each is not first else "",
            each.num_texts,
        ]
        for each in perplexities
    ]
    title = f"perplexity of the last {first.num_scored} tokens of held-out {first.source}, by context length"
    against = f"against {length_label(first.length)}"
    headers = ["context", "perplexity", "standard error", "bits a byte", against, "texts"]
    return f"{title}\n{tabulate.tabulate(rows, headers=headers, disable_numparse=True, stralign='right')}"


def _change(each: Perplexity) -> str:
    error = "" if each.change_error is None else f" ± {100 * each.change_error:.2f}"
    return f"{100 * each.change:+.2f}{error} %"


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
