"""Shared by all benchmarks: schedules are tuned before they are timed, ratios are printed and kept."""

from collections.abc import Callable

import pytest
import torch

from hsa_compile import Problem, Target, default_cache, tune
from hsa_compile.autotune.bench.bench import measure, quantile

Call = Callable[[], object]


@pytest.fixture
def tuned() -> Callable[[Problem], None]:
    """Tunes a problem's forward and backward on this CPU unless the user's cache holds them."""

    def ensure(problem: Problem) -> None:
        target = Target.parse("cpu")
        for op in ("hsa_forward", "hsa_backward"):
            if default_cache().exact(problem.with_op(op), target) is None:
                default_cache().put(tune(problem.with_op(op), target, timeout=60))

    return ensure


@pytest.fixture
def race(
    benchmark, capsys: pytest.CaptureFixture[str]
) -> Callable[[dict[str, Call], int, dict[str, float]], dict[str, float]]:
    """Times contenders in turns, the first of them ours; prints and returns how much longer the others take."""

    def run(contenders: dict[str, Call], rounds: int, wanted: dict[str, float]) -> dict[str, float]:
        medians = {}
        names = list(contenders)
        for call in contenders.values():
            call()
        times = dict(zip(names, measure(list(contenders.values()), torch.device("cpu"), rounds=rounds), strict=True))
        with capsys.disabled():
            print()
            for name in names:
                ratios = [other / ours for other, ours in zip(times[name], times[names[0]], strict=True)]
                ratio = quantile(ratios, 0.5)
                goal = f" (goal {wanted[name]:g}x)" if name in wanted else ""
                versus = f"   ours is {ratio:.2f}x faster{goal}" if name != names[0] else ""
                print(f"  {name:24} {quantile(times[name], 0.5):9.1f} ms{versus}")
                medians[name] = ratio
                benchmark.extra_info[name] = {"median_ms": quantile(times[name], 0.5), "ratio": ratio}
        benchmark.pedantic(contenders[names[0]], rounds=rounds)
        return medians

    return run
