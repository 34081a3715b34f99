"""The documentation's tables of what trained models find, from files that `hsa-compile eval` wrote.

python benchmarks/retrieval_table.py benchmarks/results/eval_*.json                    # a column for each length
python benchmarks/retrieval_table.py benchmarks/results/eval_*.json --across models    # a column for each model

Files are named eval_MODEL.WHAT.json.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import tabulate

from hsa_compile.model.config import TEACHER_FORCED
from hsa_compile.model.evaluation.settings import length_label


@dataclass(frozen=True, slots=True)
class Entry:
    """What one model found of one task at one length, by one protocol."""

    model: str
    task: str
    protocol: str
    length: int
    text: str

    @property
    def column(self) -> str:
        """The length, and the protocol if it is not the authors' own."""
        label = length_label(self.length)
        return label if self.protocol == TEACHER_FORCED else f"{label}, {self.protocol}"


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--across", type=click.Choice(["lengths", "models"]), default="lengths", show_default=True)
@click.option("--format", "style", default="github", show_default=True, help="The table format of tabulate.")
def main(files: tuple[Path, ...], across: str, style: str) -> None:
    """Accuracy in percent over all depths, with its 95 % interval; files of one model are put together."""
    entries = [entry for path in files for entry in _entries(path)]
    by_column = sorted(entries, key=lambda e: (e.length, e.protocol != TEACHER_FORCED))
    if across == "lengths":
        names, columns = ["model", "task"], list(dict.fromkeys(e.column for e in by_column))
        cells = {(e.model, e.task, e.column): e.text for e in entries}
    else:
        names, columns = ["task", "length"], list(dict.fromkeys(e.model for e in entries))
        tasks = list(dict.fromkeys(e.task for e in entries))
        by_column.sort(key=lambda e: tasks.index(e.task))
        cells = {(e.task, e.column, e.model): e.text for e in by_column}
    rows = [
        [*row, *(cells.get((*row, column), "") for column in columns)] for row in dict.fromkeys(c[:2] for c in cells)
    ]
    print(tabulate.tabulate(rows, headers=[*names, *columns], tablefmt=style, disable_numparse=True))


def _entries(path: Path) -> Iterator[Entry]:
    """Yields the tasks of a file and, if it has them, their means; files from before there were means are read too."""
    model = path.name.removeprefix("eval_").split(".")[0]
    found = json.loads(path.read_text())
    means = [mean | {"task": "mean", "haystack": f"{mean['tasks']} tasks"} for mean in found.get("means", [])]
    for cell in [each for each in found["retrieval"] if each["depth"] is None] + means:
        text = f"{100 * cell['accuracy']:.3g} ({100 * cell['low']:.0f} – {100 * cell['high']:.0f})"
        yield Entry(model, f"{cell['task']}, {cell['haystack']}", cell["protocol"], cell["length"], text)


if __name__ == "__main__":
    main()
