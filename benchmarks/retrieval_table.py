"""The README's table of what trained models find, from files that `hsa-compile eval` wrote.

python benchmarks/retrieval_table.py benchmarks/results/eval_*.json

Files are named eval_MODEL.WHAT.json.
"""

import json
from collections import defaultdict
from pathlib import Path

import click
import tabulate

from hsa_compile.model.evaluation.lengths import length_label

Row = tuple[str, str]  # a model; a task and its haystack


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--format", "style", default="github", show_default=True, help="Of tabulate.")
def main(files: tuple[Path, ...], style: str) -> None:
    """Accuracy in percent over all depths, and how many samples; files of one model are put together."""
    found: dict[Row, dict[int, str]] = defaultdict(dict)
    for path in files:
        for cell in json.loads(path.read_text())["retrieval"]:
            if cell["depth"] is None:
                row = (path.name.removeprefix("eval_").split(".")[0], f"{cell['task']}, {cell['haystack']}")
                found[row][cell["length"]] = f"{100 * cell['accuracy']:.3g} ({cell['samples']})"
    lengths = sorted({length for cells in found.values() for length in cells})
    rows = [[*row, *(cells.get(length, "") for length in lengths)] for row, cells in found.items()]
    headers = ["model", "task", *map(length_label, lengths)]
    print(tabulate.tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True))


if __name__ == "__main__":
    main()
