"""The README's table and pictures of `hsa-compile bench`, from the file that it wrote.

python benchmarks/bench_table.py benchmarks/results/bench_cpu_2_cores.json --plots benchmarks/results
"""

from pathlib import Path

import click
import tabulate

from hsa_compile.comparison.pictures import draw
from hsa_compile.comparison.result import Comparison
from hsa_compile.comparison.table import notes_of, rows_of, shapes_of


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--plots", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder for the pictures.")
def main(file: Path, plots: Path | None) -> None:
    """A table in Markdown, what was left out and why, and on request the two pictures."""
    comparison = Comparison.from_json(file.read_text(encoding="utf-8"))
    click.echo(f"{comparison.device}, {comparison.date}: {comparison.command}")
    click.echo("\n".join(shapes_of(comparison.results)) + "\n")
    click.echo(tabulate.tabulate(rows_of(comparison), headers="keys", tablefmt="github", disable_numparse=True))
    click.echo("\n" + "\n".join(notes_of(comparison.results)))
    for path in draw(comparison, plots) if plots else ():
        click.echo(path)


if __name__ == "__main__":
    main()
