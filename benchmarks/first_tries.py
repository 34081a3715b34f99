"""What should a search on a GPU try first? Rules are held to recorded times.

    python benchmarks/first_tries.py

The times are those of `results/schedules_h100.json`. The rules that learn from times choose for a problem
without its own. Many choices were never timed, and may be better or worse than what was. So each figure is the loss,
against the best that was timed, of those choices that were; how many these are stands beside.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from tabulate import tabulate

from hsa_compile.autotune.cost.predict_schedule import ranked_candidates
from hsa_compile.autotune.session import MAX_NEIGHBOURS, with_rows_kept
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.target import PRODUCTS

RESULTS = Path(__file__).parent / "results" / "schedules_h100.json"
TARGET = PRODUCTS["h100"]
COUNTS = (1, 8, 25)  # of first tries
PORTFOLIO = 25

Times = dict[Problem, dict[Schedule, float]]
Rule = Callable[[Problem, Times], list[Schedule]]


def problem_of(op: str, kv_heads: int) -> Problem:
    """The problem that was recorded for an op and a number of kv heads."""
    return Problem(op=op, seq_len=65536, num_heads=32, num_kv_heads=kv_heads, head_dim=128, top_k=16, dtype="bfloat16")


def recorded() -> Times:
    """The geometric mean over both kinds of picks of each schedule that is valid today."""
    times: Times = {}
    for row in json.loads(RESULTS.read_text(encoding="utf-8"))["timed"]:
        problem, schedule = problem_of(row["op"], row["num_kv_heads"]), Schedule.parse(row["schedule"])
        if SearchSpace.of(problem, TARGET).is_valid(schedule):
            times.setdefault(problem, {})[schedule] = math.sqrt(row["random_ms"] * row["trained_ms"])
    return times


def default(problem: Problem, times: Times) -> list[Schedule]:
    """The default schedule, which runs without any trial."""
    return [SearchSpace.of(problem, TARGET).default()]


def winners_as_they_are(problem: Problem, times: Times) -> list[Schedule]:
    """The best six of each other group, one after the other, as far as they can run."""
    return list(_winners(problem, times, keep_rows=False))


def winners_with_rows_kept(problem: Problem, times: Times) -> list[Schedule]:
    """The same, their tiles with as many rows as they had."""
    return list(_winners(problem, times, keep_rows=True))


def portfolio(problem: Problem, times: Times) -> list[Schedule]:
    """A greedy cover of the other groups: each next schedule lowers their mean loss most, as far as it was timed."""
    space = SearchSpace.of(problem, TARGET)
    losses: dict[Schedule, dict[Problem, float]] = {}
    for other in _others(problem, times):
        best = min(times[other].values())
        for schedule, ms in times[other].items():
            kept = space.fit(with_rows_kept(schedule, other.group, problem.group, space))
            if space.is_valid(kept):
                known = losses.setdefault(kept, {})
                known[other] = min(math.log(ms / best), known.get(other, math.inf))
    chosen: list[Schedule] = []
    least = dict.fromkeys(_others(problem, times), 1.0)
    while losses and len(chosen) < PORTFOLIO:

        def cost(schedule: Schedule) -> tuple[float, float]:
            after = sum(min(loss, losses[schedule].get(other, 1.0)) for other, loss in least.items())
            return after, sum(losses[schedule].values()) / len(losses[schedule])

        schedule = min(losses, key=cost)
        for other, loss in losses.pop(schedule).items():
            least[other] = min(least[other], loss)
        chosen.append(schedule)
    return chosen


def model(problem: Problem, times: Times) -> list[Schedule]:
    """The order of the cost model, without the default."""
    return ranked_candidates(problem, TARGET)[1:]


def as_tuned(problem: Problem, times: Times) -> list[Schedule]:
    """What a search tries first: the default, three winners with their rows kept, and what the model ranks best."""
    neighbours = winners_with_rows_kept(problem, times)[:MAX_NEIGHBOURS]
    return [*default(problem, times), *neighbours, *model(problem, times)[:1]]


def _others(problem: Problem, times: Times) -> list[Problem]:
    return [other for other in times if other.op == problem.op and other != problem]


def _winners(problem: Problem, times: Times, *, keep_rows: bool) -> Iterator[Schedule]:
    space = SearchSpace.of(problem, TARGET)
    ranked = [sorted(times[other], key=lambda s, own=times[other]: own[s])[:6] for other in _others(problem, times)]
    for place in zip(*ranked, strict=False):
        for other, schedule in zip(_others(problem, times), place, strict=True):
            fitting = with_rows_kept(schedule, other.group, problem.group, space) if keep_rows else schedule
            if space.is_valid(space.fit(fitting)):
                yield space.fit(fitting)


RULES: tuple[Rule, ...] = (default, winners_as_they_are, winners_with_rows_kept, portfolio, model, as_tuned)


def main() -> None:
    """Prints a row for each problem and rule: the loss of the best of its first choices, and how many were timed."""
    times = recorded()
    rows = []
    for problem, known in times.items():
        best = min(known.values())
        for rule in RULES:
            listed = list(dict.fromkeys(rule(problem, times)))
            row = [f"{problem.op} G{problem.group}, {len(known)} timed", rule.__name__]
            for count in COUNTS:
                timed = [known[schedule] / best for schedule in listed[:count] if schedule in known]
                row.append(f"{min(timed):.3f} ({len(timed)})" if timed else "")
            rows.append(row)
    print(tabulate(rows, headers=["problem", "rule", *(f"first {n}" for n in COUNTS)], disable_numparse=True))


if __name__ == "__main__":
    main()
