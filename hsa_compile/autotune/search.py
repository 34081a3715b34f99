"""The search loop of one worker: propose, compile ahead, evaluate and tell, until trials, time or space run out."""

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from hsa_compile.autotune.bench.bench import Bench
from hsa_compile.autotune.bench.isolation import CompilePool
from hsa_compile.autotune.cost.roofline import Resources
from hsa_compile.autotune.evaluate import Baseline, Outcome, evaluate, measure_default
from hsa_compile.autotune.study.ledger import ProblemLedger
from hsa_compile.autotune.study.study import Finished, Proposal, TuningStudy
from hsa_compile.problem import DISTRIBUTIONS
from hsa_compile.schedules.schedule import Schedule

PATIENCE = 20  # a search without a model has settled when so many trials gained little
MODEL_PATIENCE = 10  # with a model so many are enough, if the model expects no more


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One candidate that was timed.

    Attributes:
        schedule: what was timed.
        ratio: the median, over the rounds, of its time divided by the default's.
        median_ms: the median of its times.
        ratios: the ratio on each of several distributions; empty where the search is for one.
        resources: what it uses, where the compiler tells.
    """

    schedule: Schedule
    ratio: float
    median_ms: float
    ratios: Mapping[str, float] = field(default_factory=dict)
    resources: Resources | None = None


@dataclass(slots=True, kw_only=True)
class SearchResult:
    """The outcomes that a study holds.

    Attributes:
        trials: the timed candidates, in the order in which they were tried.
        failures: how many candidates failed, by the name of the error.
        num_known: how many trials and failures the ledger knew, so that they cost no time.
    """

    trials: list[Trial] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    num_known: int = 0

    @property
    def num_tried(self) -> int:
        """How many candidates were timed or failed."""
        return len(self.trials) + self.failures.total()

    @property
    def best(self) -> Trial:
        """The trial with the least ratio."""
        return min(self.trials, key=lambda trial: trial.ratio)

    @staticmethod
    def of(finished: Sequence[Finished]) -> "SearchResult":
        """Returns the result that these outcomes add up to."""
        result = SearchResult()
        for one in finished:
            result.num_known += not one.counted
            ratio, median_ms = one.outcome.ratio, one.outcome.median_ms
            if ratio is None or median_ms is None:
                result.failures[one.outcome.failure] += 1
            else:
                trial = Trial(
                    schedule=one.schedule,
                    ratio=ratio,
                    median_ms=median_ms,
                    ratios=one.outcome.ratios,
                    resources=one.outcome.resources,
                )
                result.trials.append(trial)
        return result

    def has_settled(self, within: float, patience: int = PATIENCE) -> bool:
        """Returns whether the last `patience` candidates together improved the best by at most a share `within`.

        If candidates came in random order, one in `patience + 1` searches that settle so would find a better one
        next; a sampler that looks in good places first has less left to find.
        """
        ratios = [trial.ratio for trial in self.trials]
        if len(ratios) <= patience:
            return False
        return min(ratios) >= (1 - within) * min(ratios[:-patience])


def search(
    study: TuningStudy,
    bench: Bench,
    *,
    deadline: float,
    inputs: Sequence[str] = (DISTRIBUTIONS[0],),
    pool: CompilePool | None = None,
    pause_to_time: bool = False,
    until_within: float | None = None,
    ledger: ProblemLedger | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_trial: Callable[[SearchResult], None] = lambda result: None,
) -> SearchResult:
    """Tries schedules until the study has its trials, or the time or the space runs out.

    Args:
        study: the study that says what was tried and what to try; the first of its first schedules is the default.
        bench: where candidates are checked and timed.
        deadline: `time.monotonic()` after which no new candidate but the default begins.
        inputs: the names of the distributions that the bench has.
        pool: what compiles candidates ahead; without one, the bench compiles each in its turn.
        pause_to_time: whether to compile nothing while a candidate is timed, since it would use the same cores.
        until_within: ends the search when the sampler's model expects no more than this share of the best time from
            all points that are left, and the last `MODEL_PATIENCE` candidates bore it out; where it has no model, when
            the last `PATIENCE` did.
        ledger: what gets each outcome, before the study does.
        should_stop: asked before each candidate.
        on_trial: called with the study's result after each candidate of this worker.

    Raises:
        HSACompileError: the default schedule itself fails.
    """
    default = study.first[0]
    compiled = pool.submit(default).result if pool else None  # while the bench still opens
    baseline = measure_default(default, bench, inputs=inputs, compiled=compiled)
    window = _Window(study, pool, pause_to_time)

    result = SearchResult.of(study.finished())

    def is_over() -> bool:
        settled = until_within is not None and _has_settled(study, result, until_within)
        return settled or time.monotonic() >= deadline or should_stop()

    with study.heartbeat, contextlib.ExitStack() as ending:
        ending.callback(window.release)  # once nobody proposes any more
        proposing = ending.enter_context(ThreadPoolExecutor(1, thread_name_prefix="propose"))
        # The default, the first trial of all, is tried whatever the clock says.
        while (not result.num_tried or not is_over()) and (proposal := window.next(only_one=not result.num_tried)):
            ahead = proposing.submit(window.fill_ahead) if result.num_tried else None
            outcome = _outcome(proposal, window, bench, baseline, result)
            if ahead is not None:
                ahead.result()
            if ledger is not None:
                ledger.add(proposal.schedule, outcome)
            study.tell(proposal, outcome)
            window.done()
            result = SearchResult.of(study.finished())
            on_trial(result)
    return result


def _has_settled(study: TuningStudy, result: SearchResult, within: float) -> bool:
    if not result.has_settled(within, MODEL_PATIENCE):
        return False
    gain = study.expected_gain()
    return result.has_settled(within) if gain is None else gain <= within


class _Window:
    """The proposals that are being compiled or timed.

    What is compiled first is timed first, so that a slow compilation keeps no device waiting. Where compiling pauses
    for each timing, proposals are timed in their order, which a search that was killed repeats.
    """

    def __init__(self, study: TuningStudy, pool: CompilePool | None, pause_to_time: bool) -> None:
        self._study, self._pool, self._pause = study, pool, pause_to_time
        self._waiting: deque[tuple[Proposal, Future[Resources | None] | None]] = deque()
        self._current: Proposal | None = None
        self._timing = False  # whether a batch is being timed, while nothing new is compiled
        self.compiled: Callable[[], Resources | None] | None = None

    def next(self, *, only_one: bool) -> Proposal | None:
        """Returns the next proposal to be timed; None when nothing is left to propose."""
        self._refill(only_one)
        self._timing = len(self._waiting) > 1
        if not self._waiting:
            return None
        futures = [future for _, future in self._waiting if future is not None]
        wait(futures, return_when=ALL_COMPLETED if self._pause else FIRST_COMPLETED)
        ready = next(i for i, (_, future) in enumerate(self._waiting) if future is None or future.done())
        self._current, future = self._waiting[ready]
        del self._waiting[ready]
        self.compiled = future.result if future is not None else None
        return self._current

    def fill_ahead(self) -> None:
        """Proposes what is to be compiled next, while a candidate is timed on a device that has none of these cores."""
        if not self._pause and self._pool is not None:
            self._refill(only_one=False)

    def done(self) -> None:
        """Drops the current proposal, whose outcome is told."""
        self._current = None

    def release(self) -> None:
        """Gives back the proposals that were begun and not told."""
        for proposal in [self._current, *(proposal for proposal, _ in self._waiting)]:
            if proposal is not None:
                self._study.release(proposal)

    def _refill(self, only_one: bool) -> None:
        size = 1 if self._pool is None else self._pool.size
        while self._wants_more(size, only_one) and (proposal := self._study.propose()) is not None:
            self._waiting.append((proposal, self._pool.submit(proposal.schedule) if self._pool else None))

    def _wants_more(self, size: int, only_one: bool) -> bool:
        if not self._waiting:
            return True
        if self._pause:
            # Batches end at fixed places in the study, after its first trial, the default: a search that was killed
            # within a batch proposes what it would have.
            return size > 1 and not self._timing and (self._study.num_counted() - 1) % size != 0
        return not only_one and self._pool is not None and len(self._waiting) <= size


def _outcome(proposal: Proposal, window: _Window, bench: Bench, baseline: Baseline, result: SearchResult) -> Outcome:
    if proposal.schedule == baseline.schedule:
        return baseline.outcome
    best_ratio = result.best.ratio if result.trials else 1.0
    return evaluate(proposal.schedule, bench, baseline, best_ratio=best_ratio, compiled=window.compiled)
