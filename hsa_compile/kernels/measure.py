"""The timing of kernels: candidates are timed in turns, so that drift hits all of them alike."""

import time
from collections.abc import Callable, Sequence

import torch

from hsa_compile.schedules.record import Measurement

Call = Callable[[], object]

_FLUSH_BYTES = 256 << 20  # more than any GPU's L2 cache holds


def measure(calls: Sequence[Call], device: torch.device, *, rounds: int) -> list[list[float]]:
    """Times several calls in interleaved rounds: round after round, each call once, in alternating order.

    Args:
        calls: what to time, already warm.
        device: where they run; on a GPU times come from events, after the L2 cache was overwritten.
        rounds: how often each call is timed.

    Returns:
        for each call its times in milliseconds, in the order of the rounds; times of one round belong together.
    """
    time_once = _time_on_gpu(device) if device.type == "cuda" else _time_on_cpu
    times: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    for _ in range(rounds):
        for i in order:
            times[i].append(time_once(calls[i]))
        order.reverse()
    return times


def summarize(times: Sequence[float]) -> Measurement:
    """Returns the median and the 20th and 80th percentiles of times in milliseconds."""
    return Measurement(
        median_ms=quantile(times, 0.5), p20_ms=quantile(times, 0.2), p80_ms=quantile(times, 0.8), repeats=len(times)
    )


def quantile(values: Sequence[float], q: float) -> float:
    """Returns a quantile (`q` = 0 … 1), interpolated linearly between the closest ranks."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def _time_on_cpu(call: Call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _time_on_gpu(device: torch.device) -> Callable[[Call], float]:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def time_once(call: Call) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        with torch.cuda.device(device):
            start.record()
            call()
            end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return time_once
