"""What an evaluation found, as JSON, CSV, tables and pictures."""

import csv
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
from hsa_compile.model.evaluation.cells import Cell, Mean, mean_of
from hsa_compile.model.evaluation.perplexity import Perplexity
from hsa_compile.model.evaluation.settings import length_label
from hsa_compile.model.tasks.family import TASKS
from hsa_compile.versions import require

JSON_FILE, CSV_FILE = "results.json", "results.csv"
_COLUMNS = (
    "model", "task", "haystack", "protocol", "length", "depth", "samples", "correct", "accuracy", "low", "high",
    "chance", "perplexity", "standard_error", "bits_per_byte", "change", "change_error",
)  # fmt: skip


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

    @property
    def means(self) -> list[Mean]:
        """The mean of the tasks at each length, for those lengths at which all tasks were asked."""
        num_tasks = len({cell.task for cell in self.cells})
        groups: dict[tuple[str, int], list[Cell]] = {}
        for cell in self.cells:
            if cell.depth is None:
                groups.setdefault((cell.protocol, cell.length), []).append(cell)
        return [mean_of(cells) for cells in groups.values() if len(cells) == num_tasks > 1]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values; a cell whose depth is None holds all depths."""
        used = dict.fromkeys(cell.protocol for cell in self.cells)
        return {
            "model": self.model,
            "settings": self.settings,
            "protocols": {name: PROTOCOLS[name] for name in used},
            "tasks": {
                name: {"public": task.public, "chance": task.chance, "any_needle": task.any_needle}
                for name, task in TASKS.items()
                if any(cell.task == name for cell in self.cells)
            },
            "retrieval": [_cell_values(cell) | _place_values(cell) for cell in self.cells],
            "means": [
                {
                    "protocol": mean.protocol,
                    "length": mean.length,
                    "tasks": mean.num_tasks,
                    "accuracy": mean.accuracy,
                    "low": mean.interval[0],
                    "high": mean.interval[1],
                }
                for mean in self.means
            ],
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
        """Returns tables for each protocol, by task and by place of needles in chunks, and one of perplexities."""
        tables = []
        for protocol in dict.fromkeys(cell.protocol for cell in self.cells):
            cells = [cell for cell in self.cells if cell.protocol == protocol]
            tables.append(_task_table(protocol, cells, [mean for mean in self.means if mean.protocol == protocol]))
            if any(cell.by_offset for cell in cells):
                tables.append(_place_table(protocol, cells))
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
                        "standard_error": each.standard_error,
                        "bits_per_byte": each.bits_per_byte,
                        "change": each.change,
                        "change_error": each.change_error,
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
        "chance": TASKS[cell.task].chance,
    }


def _place_values(cell: Cell) -> dict[str, Any]:
    """Returns plain values that say where needles lay in their chunks; none where a cell knows of no places."""
    if not cell.by_offset:
        return {}
    by_offset = {str(offset): _counts(*counts) for offset, counts in cell.by_offset.items()}
    return {"by_offset": by_offset, "cut_by_a_border": _counts(*cell.cut)}


def _counts(samples: int, correct: int) -> dict[str, int]:
    return {"samples": samples, "correct": correct}


def _task_table(protocol: str, cells: Sequence[Cell], means: Sequence[Mean]) -> str:
    """Returns a row a task and length, and the means of the tasks."""
    depths = sorted({cell.depth for cell in cells if cell.depth is not None})
    rows = []
    for task, haystack, length in dict.fromkeys((cell.task, cell.haystack, cell.length) for cell in cells):
        of_row = {cell.depth: cell for cell in cells if (cell.task, cell.length) == (task, length)}
        every = of_row[None]
        shares = [f"{100 * of_row[depth].accuracy:.0f}" if depth in of_row else "" for depth in depths]
        rows.append(
            [task, haystack, length_label(length), *shares, f"{100 * every.accuracy:.1f}", _interval(every.interval),
             f"{100 * TASKS[task].chance:.2g}", every.num_samples]
        )  # fmt: skip
    for mean in means:
        rows.append(
            [f"mean of {mean.num_tasks}", "", length_label(mean.length), *("" for _ in depths),
             f"{100 * mean.accuracy:.1f}", _interval(mean.interval), "", ""]
        )  # fmt: skip
    headers = ["task", "haystack", "length", *(f"at {depth_label(depth)}" for depth in depths), "all", "95 % interval",
               "chance", "samples"]  # fmt: skip
    align = ("left", "left", *("right" for _ in headers[2:]))
    table = tabulate.tabulate(rows, headers=headers, disable_numparse=True, colalign=align)
    return f"right answers in %, {protocol}\n{table}"


_PARTS = 8  # into how many parts a table cuts the offsets of a chunk


def _place_table(protocol: str, cells: Sequence[Cell]) -> str:
    """Returns a row a task, all lengths together: accuracy by where in its chunk the needle begins."""
    size = 1 + max(offset for cell in cells for offset in cell.by_offset)
    step = max(1, 2 ** math.ceil(math.log2(size)) // _PARTS)
    starts = range(0, size, step)
    rows = []
    for task in dict.fromkeys(cell.task for cell in cells if cell.by_offset):
        of_task = [cell for cell in cells if cell.task == task]
        counts = [(offset, *count) for cell in of_task for offset, count in cell.by_offset.items()]
        parts = [_share([count[1:] for count in counts if start <= count[0] < start + step]) for start in starts]
        samples, right = sum(count[1] for count in counts), sum(count[2] for count in counts)
        num_cut, right_cut = sum(cell.cut[0] for cell in of_task), sum(cell.cut[1] for cell in of_task)
        cut = [f"{100 * num_cut / samples:.0f}", _share([(num_cut, right_cut)])]
        rows.append([task, *parts, *cut, _share([(samples - num_cut, right - right_cut)])])
    labels = [f"{start}" if step == 1 else f"{start}–{start + step - 1}" for start in starts]
    headers = ["task", *labels, "over a border", "right of those", "of others"]
    align = ("left", *("right" for _ in headers[1:]))
    table = tabulate.tabulate(rows, headers=headers, disable_numparse=True, colalign=align)
    return f"right answers in % by where in its chunk the needle begins, {protocol}, all lengths\n{table}"


def _share(counts: Sequence[tuple[int, ...]]) -> str:
    samples = sum(count[0] for count in counts)
    return f"{100 * sum(count[1] for count in counts) / samples:.0f}" if samples else ""


def _interval(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f}"


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
