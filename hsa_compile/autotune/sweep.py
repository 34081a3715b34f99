"""Every valid schedule of a problem, timed one after the other: the whole truth, to replay searches on."""

from collections.abc import Callable

from hsa_compile.autotune.bench import Bench
from hsa_compile.autotune.ledger import ProblemLedger
from hsa_compile.autotune.outcome import Outcome
from hsa_compile.autotune.stages import evaluate, measure_default
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.target import Target

MORE_ROUNDS = 24


def sweep(
    problem: Problem,
    target: Target,
    default: Schedule,
    bench: Bench,
    ledger: ProblemLedger,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    on_outcome: Callable[[int, int], None] = lambda done, of: None,
) -> dict[Schedule, Outcome]:
    """The outcome of every valid schedule, in the order of the space, or of those up to when it was told to stop.

    Args:
        default: that all are timed in turns with.
        ledger: has what an earlier, interrupted sweep or search timed, and gets what this one does.
        should_stop: asked before each candidate.
        on_outcome: called with how many are done, and of how many.
    """
    outcomes = ledger.known()
    valid = list(SearchSpace.of(problem, target).schedules())
    baseline = measure_default(default, bench)
    if default not in outcomes:
        ledger.add(default, baseline.outcome)
        outcomes[default] = baseline.outcome
    for schedule in valid:
        if should_stop():
            break
        if schedule not in outcomes:
            # Each is timed in full, however slow, and longer than in a search: a sweep is to be exact everywhere, and
            # the least of many noisy times is less than the best candidate takes.
            outcome = evaluate(schedule, bench, baseline, best_ratio=float("inf"), more_rounds=MORE_ROUNDS)
            ledger.add(schedule, outcome)
            outcomes[schedule] = outcome
        on_outcome(len(outcomes), len(valid))
    return {schedule: outcomes[schedule] for schedule in valid if schedule in outcomes}
