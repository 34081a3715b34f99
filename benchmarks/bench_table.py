"""The documentation's table and pictures of `hsa-compile bench`, from the file that it wrote.

python benchmarks/bench_table.py benchmarks/results/bench_cpu_2_cores.json --plots docs/pictures
"""

from pathlib import Path

import click
import tabulate

from hsa_compile.comparison.result import (
    TIMED,
    TITLES,
    Comparison,
    Result,
    digits,
    draw,
    length_of,
    notes_of,
    shape_of,
    short_count,
)

Row = tuple[str, ...]  # op, contender, claim, and the shape where there are several


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--plots", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder for the pictures.")
def main(file: Path, plots: Path | None) -> None:
    """Times by length and over ours as Markdown, what was left out and why, and on request the two pictures."""
    comparison = Comparison.read(file)
    click.echo(f"{comparison.device}, {comparison.date}: {comparison.command}\n")
    click.echo(table(comparison))
    click.echo("\n" + "\n".join(notes_of(comparison.results)))
    for path in draw(comparison, plots) if plots else ():
        click.echo(path)


def table(comparison: Comparison) -> str:
    """A column a length; a cell is a median, and in brackets the median ratio to ours."""
    rows: dict[Row, dict[int, str]] = {}
    for result in comparison.results:
        if result.status == TIMED:
            key = (TITLES[result.kind], result.contender, result.computes, shape_of(result.problem))
            rows.setdefault(key, {})[length_of(result.problem)] = cell(result)
    lengths = sorted({length for cells in rows.values() for length in cells})
    headers = ["", "", "computes", "shape", *map(short_count, lengths)]
    body = [[*key, *(cells.get(length, "") for length in lengths)] for key, cells in rows.items()]
    return tabulate.tabulate(body, headers=headers, tablefmt="github", disable_numparse=True)


def cell(result: Result) -> str:
    assert result.measurement is not None
    time = f"{digits(result.measurement.median_ms)} ms"
    return f"{time} ({digits(result.ratio[0])}x)" if result.ratio and result.contender != "hsa-compile" else time


if __name__ == "__main__":
    main()
