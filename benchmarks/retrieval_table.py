"""The documentation's tables of what trained models find, from `benchmarks/results/tiny_recipes.json`.

python benchmarks/retrieval_table.py

Each entry of that file is a model: a recipe, a seed, and its shares of right answers by task, protocol and length, as
`hsa-compile eval` wrote them, with 20 samples a cell.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tabulate

from hsa_compile.model.config import GREEDY, TEACHER_FORCED
from hsa_compile.model.evaluation.cells import Cell, Mean, mean_of
from hsa_compile.model.evaluation.settings import length_label
from hsa_compile.model.tasks.family import TASKS

RECIPES = Path(__file__).parent / "results" / "tiny_recipes.json"
SHIPPED = "more questions a row, shipped"
BEFORE = "Muon and more values"  # the recipe that the variants were trained by
RIVALS = ("drt", "ramba", "full", "swa")
LENGTHS = (4096, 65536, 1048576)
NUM_SAMPLES = 20
NEEDLES = list(TASKS)[:9]  # the tasks that ask for needles

Found = dict[tuple[str, str, int], Cell]
Show = Callable[[Any], str]


def found_by(recipe: str) -> list[Found]:
    """Returns what each seed of a recipe found, by task, protocol and length."""
    models = [entry for entry in json.loads(RECIPES.read_text()) if entry["recipe"] == recipe]
    return [{_key(cell): _cell(cell) for cell in model["cells"]} for model in models]


def _key(cell: dict[str, Any]) -> tuple[str, str, int]:
    return cell["task"], cell["protocol"], cell["length"]


def _cell(cell: dict[str, Any]) -> Cell:
    fields = {name: cell[name] for name in ("task", "haystack", "protocol", "length")}
    return Cell(**fields, depth=None, num_samples=NUM_SAMPLES, num_correct=round(NUM_SAMPLES * cell["accuracy"]))


def seeds_table() -> str:
    """Makes the table of the shipped recipe: a column for each length, in which the seeds stand side by side."""
    models = found_by(SHIPPED)
    columns = [[(model, length) for model in models] for length in LENGTHS]
    return _table([length_label(length) for length in LENGTHS], columns, _share, by_generation=True)


def variants_table(length: int) -> str:
    """Makes the table of the variants at a length, each figure with its 95 % interval."""
    recipes = {"`tiny`": BEFORE} | {f"`{name}`": f"{BEFORE}, {name}" for name in RIVALS}
    models = {name: found_by(recipe)[0] for name, recipe in recipes.items()}
    asked = {name: model for name, model in models.items() if (NEEDLES[0], TEACHER_FORCED, length) in model}
    return _table(list(asked), [[(model, length)] for model in asked.values()], _with_interval, by_generation=False)


def _table(
    titles: Sequence[str], columns: Sequence[Sequence[tuple[Found, int]]], show: Show, *, by_generation: bool
) -> str:
    def row(title: str, found: Sequence[Sequence[Any]]) -> list[str]:
        return [title, *(" · ".join(show(each) for each in column if each) for column in found)]

    rows = []
    for task in TASKS:
        forced, greedy = ([[model.get((task, protocol, length)) for model, length in column] for column in columns]
                          for protocol in (TEACHER_FORCED, GREEDY))  # fmt: skip
        rows.append(row(f"{task}, {next(cell.haystack for cell in forced[0] if cell)}", forced))
        if by_generation and _counts(forced) != _counts(greedy):
            rows.append(row(f"{task}, by generation", greedy))
    rows += [row(title, means) for title, means in _means(columns)]
    return tabulate.tabulate(rows, headers=["task", *titles], tablefmt="github", disable_numparse=True)


def _counts(found: Sequence[Sequence[Cell | None]]) -> list[list[int | None]]:
    return [[cell.num_correct if cell else None for cell in column] for column in found]


def _means(columns: Sequence[Sequence[tuple[Found, int]]]) -> Iterator[tuple[str, list[list[Any]]]]:
    """Yields rows of means over the tasks that ask for needles, and over all, by both protocols."""
    for name, tasks in (("mean of the first nine", NEEDLES), ("mean of all 17", list(TASKS))):
        for protocol, title in ((TEACHER_FORCED, name), (GREEDY, f"{name}, by generation")):
            yield title, [[_mean(model, tasks, protocol, length) for model, length in column] for column in columns]


def _mean(model: Found, tasks: Sequence[str], protocol: str, length: int) -> Mean | None:
    cells = [model.get((task, protocol, length)) for task in tasks]
    return mean_of([cell for cell in cells if cell]) if all(cells) else None


def _share(found: Any) -> str:
    return f"{100 * found.accuracy:.3g}"


def _with_interval(found: Any) -> str:
    low, high = found.interval
    return f"{_share(found)} ({100 * low:.0f} – {100 * high:.0f})"


if __name__ == "__main__":
    for each in (seeds_table(), variants_table(4096), variants_table(65536)):
        print(each, end="\n\n")
