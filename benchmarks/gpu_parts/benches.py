"""What the processes of a tuning do: some check and compile candidates, all cores at once; one alone times them."""

import math
import time
from dataclasses import replace
from typing import Any

import torch

from gpu_parts.correctness import Checker
from hsa_compile.autotune.bench.bench import measure, prepare, quantile
from hsa_compile.errors import WrongResult
from hsa_compile.kernels.compare import TOLERANCES, relative_error
from hsa_compile.kernels.compile import compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.kernels.hsa_attention.inputs import Inputs, make_inputs, pick_chunks
from hsa_compile.kernels.ops import inputs_of
from hsa_compile.problem import OPS, Problem
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import Target

DISTRIBUTIONS = ("random", "trained")

_CHECK_TOKENS, _MORE_TOKENS = 4999, 617  # odd; so many more than a long super-tile or window has
# Triton compiles for sizes that are multiples of 16 anew, but not for each of them: this length stands for all longer.
_WARM_TOKENS = 4096
_CHECK_PICKS, _CHECK_HEADS = 16, 2  # what the float64 reference gathers has to fit many times over
_HOPELESS = 2.0  # times the best after two launches
_LAUNCHES = 7
_ENOUGH_MS = 300.0  # of launches of one candidate on one distribution


def check_problem(problem: Problem, schedule: Schedule) -> Problem:
    """A smaller problem whose kernels have the same text; a schedule of the one is right if it is on the other."""
    if problem.decodes:
        return problem
    longest = max((schedule.number(knob) for knob in ("super_tile", "window") if knob in schedule), default=0)
    tokens = min(problem.seq_len, max(_CHECK_TOKENS, longest + _MORE_TOKENS))
    heads = min(problem.num_kv_heads, _CHECK_HEADS)
    picks = problem.top_k if problem.selects else min(problem.top_k, _CHECK_PICKS)
    return replace(
        problem,
        batch=1,
        seq_len=tokens,
        kv_len=tokens,
        num_heads=heads * problem.group,
        num_kv_heads=heads,
        top_k=picks,
    )


class Compiler(Checker):
    """Checks a candidate on a smaller problem, and leaves in the cache on disk the kernel that the real one needs."""

    def __init__(self, target: Target, device: str) -> None:
        super().__init__(target, device)
        self._inputs: dict[Problem, Any] = {}  # of one problem

    def prepare(self, problem: Problem, schedule: Schedule) -> None:
        """Compiles, checks and runs a candidate.

        Raises:
            CompileError, OutOfResources, WrongResult: what is the matter with it.
        """
        small = check_problem(problem, schedule)
        warm = problem
        if not problem.decodes:
            tokens = min(problem.seq_len, _WARM_TOKENS)
            warm = replace(problem, seq_len=tokens, kv_len=tokens)
        if warm not in self._inputs:
            self._inputs = {warm: inputs_of(warm, self.device)}
        if small not in self._inputs:
            self._inputs[small] = inputs_of(small, self.device)
        try:
            prepare(small, schedule, self.target, self._inputs[small])
            if self.device.type == "cuda" and warm != small:
                inputs = self._inputs[warm]
                kernel = compile_kernel(emit(problem, schedule, self.target))
                kernel.entry(*inputs.arguments(problem.op), **inputs.options(problem.op))
                torch.cuda.synchronize()
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


class Timer:
    """Times candidates of one problem after the other, while nothing else runs.

    Args:
        target: what kernels are made for.
        device: where they run, as PyTorch names it.
    """

    def __init__(self, target: Target, device: str) -> None:
        self.target, self.device = target, torch.device(device)
        if self.device.type == "cpu":
            torch.set_num_threads(target.num_cores)
        self._problem: Problem | None = None
        self._inputs: dict[str, Any] = {}

    def hello(self) -> None:
        """Shows that the device can be used."""
        torch.zeros(1, device=self.device)

    def load(self, problem: Problem) -> None:
        """Makes a problem's inputs; the backward's are those of the forward."""
        known = self._problem
        if known and (known == problem or (problem.op in OPS and known.with_op(problem.op) == problem)):
            self._problem = problem
            return
        self._problem = None  # until all is there
        self._inputs.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if problem.op not in OPS:
            self._inputs = {name: inputs_of(problem, self.device, distribution=name) for name in DISTRIBUTIONS}
        else:
            inputs = make_inputs(problem, self.device)
            for name in DISTRIBUTIONS:
                picks = pick_chunks(problem, name, torch.Generator(self.device).manual_seed(1))
                self._inputs[name] = inputs.with_indices(picks)
        self._problem = problem

    def time(self, schedule: Schedule, best_ms: float) -> dict[str, float | bool]:
        """Median milliseconds by distribution.

        Args:
            best_ms: geometric mean of the best so far; one that is far slower is launched twice and no more.

        Returns:
            `random_ms`, `trained_ms`, `ms` (their geometric mean), `first_s` (of the first call, which compiles what
            the cache on disk lacks) and whether it was `stopped`.
        """
        start = time.monotonic()
        calls = self._calls(schedule)
        for call in calls.values():
            call()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        first_s = time.monotonic() - start
        times = {name: measure([call], self.device, rounds=2)[0] for name, call in calls.items()}
        stopped = _geometric({name: quantile(found, 0.5) for name, found in times.items()}) > _HOPELESS * best_ms
        if not stopped:
            for name, call in calls.items():
                more = min(_LAUNCHES - 2, int(_ENOUGH_MS / max(times[name])))
                times[name] += measure([call], self.device, rounds=max(1, more))[0]
        medians = {name: quantile(found, 0.5) for name, found in times.items()}
        found = {f"{name}_ms": round(ms, 5) for name, ms in medians.items()}
        return {**found, "ms": round(_geometric(medians), 5), "first_s": round(first_s, 3), "stopped": stopped}

    def kernels(self, schedule: Schedule) -> dict[str, dict[str, float]]:
        """Milliseconds of each kernel that a call launches, by distribution; kernels of one name count together."""
        found: dict[str, dict[str, float]] = {}
        for name, call in self._calls(schedule).items():
            call()
            torch.cuda.synchronize()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
                call()
                torch.cuda.synchronize()
            found[name] = {}
            for event in profiled.events():
                if event.device_type == torch.autograd.DeviceType.CUDA:
                    ms = found[name].get(event.name, 0.0) + event.time_range.elapsed_us() / 1e3
                    found[name][event.name] = round(ms, 4)
        return found

    def play_off(self, schedules: list[Schedule], rounds: int) -> list[dict[str, list[float]]]:
        """Times in milliseconds of a few, in turns; by distribution, for each schedule."""
        calls = [self._calls(schedule) for schedule in schedules]
        found: list[dict[str, list[float]]] = [{} for _ in schedules]
        for name in DISTRIBUTIONS:
            for one, times in zip(
                found, measure([each[name] for each in calls], self.device, rounds=rounds), strict=True
            ):
                one[name] = times
        return found

    def compare(self, schedule: Schedule, default: Schedule) -> None:
        """Holds the results on the real inputs to those of the default schedule.

        Raises:
            WrongResult: they differ by more than both may be off.
        """
        assert self._problem is not None
        if self._problem.op == "select_chunks":  # of equal scores either may be picked
            prepare(self._problem, schedule, self.target, self._inputs["random"])
            return
        for name in DISTRIBUTIONS:
            theirs, ours = (_as_tuple(self._calls(each)[name]()) for each in (default, schedule))
            for right, found in zip(theirs, ours, strict=True):
                error = relative_error(found, right)
                if not error <= 2 * TOLERANCES[self._problem.dtype]:
                    raise WrongResult(f"on the real inputs it is off by {error:.1e} from the default ({name})")

    def _calls(self, schedule: Schedule) -> dict[str, Any]:
        assert self._problem is not None
        op = self._problem.op
        kernel = compile_kernel(emit(self._problem, schedule, self.target))

        def call_of(inputs: Inputs) -> Any:
            arguments, options = inputs.arguments(op), inputs.options(op)
            return lambda: kernel.entry(*arguments, **options)

        return {name: call_of(inputs) for name, inputs in self._inputs.items()}


def _as_tuple(results: Any) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _geometric(medians: dict[str, float]) -> float:
    return math.exp(sum(map(math.log, medians.values())) / len(medians))
