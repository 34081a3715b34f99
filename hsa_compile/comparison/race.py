"""The contest: every contender of a case is checked, then all that are right are timed in turns."""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from hsa_compile.autotune.bench.bench import measure, quantile, summarize
from hsa_compile.comparison import BOTH, DECODE, FORWARD, SELECT
from hsa_compile.comparison.contender import FOREIGN_ERRORS, SAME, Call, Case, Contender, name_and_message
from hsa_compile.comparison.peaks import Peaks
from hsa_compile.comparison.result import FAILED, LEFT_OUT, TIMED, WRONG, Result
from hsa_compile.errors import WrongResult
from hsa_compile.problem import Problem

MIN_ROUNDS, MAX_ROUNDS = 3, 15
MOST_ROUNDS, _QUICK_S = 101, 1.0  # the most rounds, of calls so quick that all of them together take no longer
_CALLS_BEFORE = 2  # a contender's check, which warms it up, and a call to see how long it takes
_LARGEST_SHARE = 0.7  # the share of the time left that a contender may take on the last case; before that, half of it
_ALWAYS_S = 1.0  # what takes no longer takes part even if no time is left
_CHEAP_FIRST = (DECODE, SELECT, FORWARD, BOTH)
# Where other processes run, two threads of ours may share a core as long as they do not rest.
_BATCH, _PAUSE_S, _TRIES = 9, 0.05, 3

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What a contender took on the last shape of a kind: to be made ready, its calls aside, and for a FLOP."""

    overhead_s: float
    flop_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A contender that gave the right answer, and the time of one warm call."""

    contender: Contender
    call: Call
    seconds: float


class Race:
    """Runs cases one after the other, short ones first, and shares a budget of time out among them.

    Args:
        contenders: who takes part; the first is ours, with which the others are compared.
        device: the device on which all run.
        peaks: the peaks of the device, by dtype.
        seconds: the time for all cases together, compilation and checks included. A contender for which it leaves no
            time is left out; ours never is.
        distribution, seed: how the picks of the inputs fall, and the seed that draws them.
    """

    def __init__(
        self,
        contenders: Sequence[Contender],
        device: torch.device,
        peaks: Mapping[str, Peaks | None],
        *,
        seconds: float,
        distribution: str = "random",
        seed: int = 0,
    ) -> None:
        self._contenders, self._device, self._peaks = tuple(contenders), device, peaks
        self._distribution, self._seed = distribution, seed
        self._deadline = time.monotonic() + seconds
        self._on_progress: Progress = lambda what: None
        self._cases_left = 0
        self._paces: dict[tuple[str, str], Pace] = {}  # by name and kind

    def run(
        self, entries: Sequence[tuple[str, Problem]], *, on_progress: Progress = lambda what: None
    ) -> Iterator[list[Result]]:
        """Yields the results of each case when it is finished.

        Args:
            entries: kind and problem of each.
            on_progress: is told what is done next.
        """
        self._on_progress = on_progress
        ordered = sorted(entries, key=lambda entry: (entry[1].kv_len, _CHEAP_FIRST.index(entry[0])))
        for done, (kind, problem) in enumerate(ordered):
            now, self._cases_left = time.monotonic(), len(ordered) - done
            until = now + max(0.0, self._deadline - now) / self._cases_left
            case = Case.of(kind, problem, self._device, distribution=self._distribution, seed=self._seed)
            yield self._run_case(case, until)

    def _run_case(self, case: Case, until: float) -> list[Result]:
        entered = [contender for contender in self._contenders if case.kind in contender.kinds]
        outcomes: dict[str, Ready | Result] = {}
        for contender in entered:
            self._on_progress(f"{label(case)}: {contender.name}")
            outcomes[contender.name] = self._prepare(contender, case)
        ready = [outcome for outcome in outcomes.values() if isinstance(outcome, Ready)]
        times = self._time(case, ready, until)
        ours = times.get(self._contenders[0].name)
        return [
            self._result(outcome.contender, case, times[name], ours) if isinstance(outcome, Ready) else outcome
            for name, outcome in outcomes.items()
        ]

    def _prepare(self, contender: Contender, case: Case) -> Ready | Result:
        """Checks a contender and warms it up; a result without times if it cannot take part."""
        if reason := contender.why_not(case) or self._too_slow(contender, case):
            return _untimed(contender, case, LEFT_OUT, reason)
        begun = time.monotonic()
        try:
            with _told_by_errors(contender):
                call = contender.make(case)
                contender.check(case, call)
                seconds = _seconds_of(call, case.device)
        except WrongResult as error:
            return _untimed(contender, case, WRONG, str(error))
        except torch.OutOfMemoryError as error:
            return _untimed(contender, case, LEFT_OUT, name_and_message(error))
        except FOREIGN_ERRORS as error:
            # A library that does not run here disproves nothing; one that claims to be the op must run all of it.
            status = FAILED if contender.computes == SAME else LEFT_OUT
            return _untimed(contender, case, status, name_and_message(error))
        overhead_s = max(0.0, time.monotonic() - begun - _CALLS_BEFORE * seconds)
        self._paces[contender.name, case.kind] = Pace(overhead_s=overhead_s, flop_s=seconds / contender.effort_of(case))
        return Ready(contender=contender, call=call, seconds=seconds)

    def _too_slow(self, contender: Contender, case: Case) -> str | None:
        """Judges by its pace on the last shape, or at the peak if there was none; None if it is quick enough."""
        if contender is self._contenders[0]:
            return None
        pace, peaks = self._paces.get((contender.name, case.kind)), self._peaks.get(case.problem.dtype)
        calls, seconds = _CALLS_BEFORE + MIN_ROUNDS, 0.0
        if pace:
            seconds = pace.overhead_s + calls * pace.flop_s * contender.effort_of(case)
        elif peaks:
            seconds = calls * contender.work(case).flops / (peaks.tflops * 1e12)
        left = self._deadline - time.monotonic()
        if seconds <= max(_ALWAYS_S, _LARGEST_SHARE * left / min(self._cases_left, 2)):
            return None
        return f"to check it and to time {MIN_ROUNDS} rounds would take most of what is left of --seconds"

    def _time(self, case: Case, ready: Sequence[Ready], until: float) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {one.contender.name: [] for one in ready}
        if not ready:
            return times
        a_round = sum(one.seconds for one in ready)
        rounds = _num_rounds(a_round, until - time.monotonic())
        self._on_progress(f"{label(case)}: {rounds} rounds")
        for done in range(0, rounds, _BATCH):
            if done:
                time.sleep(_PAUSE_S)
            found = measure([one.call for one in ready], case.device, rounds=min(_BATCH, rounds - done))
            for collected, new in zip(times.values(), found, strict=True):
                collected += new
        return times

    def _result(self, contender: Contender, case: Case, times: Sequence[float], ours: Sequence[float] | None) -> Result:
        work, measurement = contender.work(case), summarize(times)
        ratio = None
        if ours is not None:
            ratios = [one / other for one, other in zip(times, ours, strict=True)]
            ratio = (quantile(ratios, 0.5), quantile(ratios, 0.2), quantile(ratios, 0.8))
        return Result(
            kind=case.kind,
            problem=case.problem,
            contender=contender.name,
            computes=contender.computes,
            status=TIMED,
            note=contender.note(case),
            measurement=measurement,
            ratio=ratio,
            tflops=work.flops / measurement.median_ms / 1e9,
            gb_s=work.memory_bytes / measurement.median_ms / 1e6,
        )


def _num_rounds(a_round_s: float, left_s: float) -> int:
    most = min(MOST_ROUNDS, max(MAX_ROUNDS, int(_QUICK_S / max(a_round_s, 1e-9))))
    return min(most, max(MIN_ROUNDS, int(max(left_s, _QUICK_S) / max(a_round_s, 1e-9))))


def _seconds_of(call: Call, device: torch.device) -> float:
    """Times one warm call; if it is quick, it takes the best of a few."""
    best = float("inf")
    for _ in range(_TRIES):
        synchronize(device)
        start = time.monotonic()
        call()
        synchronize(device)
        best = min(best, time.monotonic() - start)
        if best > _QUICK_S / _TRIES:
            break
        time.sleep(_PAUSE_S)
    return best


def label(case: Case) -> str:
    """Returns kind and length, for a progress bar."""
    return f"{case.kind} {case.problem.kv_len}"


@contextlib.contextmanager
def _told_by_errors(contender: Contender) -> Iterator[None]:
    """Silences the warnings of other libraries: why a kernel cannot run is in the error that follows."""
    with warnings.catch_warnings():
        if contender.computes != SAME:
            warnings.simplefilter("ignore")
        yield


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _untimed(contender: Contender, case: Case, status: str, note: str) -> Result:
    return Result(
        kind=case.kind,
        problem=case.problem,
        contender=contender.name,
        computes=contender.computes,
        status=status,
        note=note,
    )
