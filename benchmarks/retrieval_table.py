"""The documentation's table of what trained models find, from files that `hsa-compile eval` wrote.

python benchmarks/retrieval_table.py benchmarks/results/eval_*.json                    # a column for each length
python benchmarks/retrieval_table.py benchmarks/results/eval_*.json --across models    # a column for each model

Files are named eval_MODEL.WHAT.json.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import click
import tabulate

from hsa_compile.model.evaluation.settings import length_label


@dataclass(frozen=True, slots=True)
class Entry:
    """What one model found of one task at one length."""

    model: str
    task: str
    length: int
    text: str


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--across", type=click.Choice(["lengths", "models"]), default="lengths", show_default=True)
@click.option("--format", "style", default="github", show_default=True, help="Of tabulate.")
def main(files: tuple[Path, ...], across: str, style: str) -> None:
    """Accuracy in percent over all depths, and how many samples; files of one model are put together."""
    entries = [entry for path in files for entry in _entries(path)]
    if across == "lengths":
        names, columns = ["model", "task"], [length_label(length) for length in sorted({e.length for e in entries})]
        cells = {(e.model, e.task, length_label(e.length)): e.text for e in entries}
    else:
        names, columns = ["task", "length"], list(dict.fromkeys(e.model for e in entries))
        entries.sort(key=lambda e: e.length)
        tasks = list(dict.fromkeys(e.task for e in entries))
        entries.sort(key=lambda e: tasks.index(e.task))
        cells = {(e.task, length_label(e.length), e.model): e.text for e in entries}
    rows = [
        [*row, *(cells.get((*row, column), "") for column in columns)] for row in dict.fromkeys(c[:2] for c in cells)
    ]
    print(tabulate.tabulate(rows, headers=[*names, *columns], tablefmt=style, disable_numparse=True))


def _entries(path: Path) -> list[Entry]:
    model = path.name.removeprefix("eval_").split(".")[0]
    return [
        Entry(
            model,
            f"{cell['task']}, {cell['haystack']}",
            cell["length"],
            f"{100 * cell['accuracy']:.3g} ({cell['samples']})",
        )
        for cell in json.loads(path.read_text())["retrieval"]
        if cell["depth"] is None
    ]


if __name__ == "__main__":
    main()
