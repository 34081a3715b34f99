"""What bounds every contender on a device: data sheet figures of a GPU, measured ones of a CPU."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from hsa_compile.device_peaks import LIMITS, limits_of
from hsa_compile.errors import InvalidArgument
from hsa_compile.target import Target

_MATMUL_SIZE = 2048
_COPY_BYTES = 256 << 20  # beyond any cache
_ROUNDS = 5
_SLOW_S = 2.0  # a dtype that a CPU has no fast products of is not measured longer


@dataclass(frozen=True, slots=True, kw_only=True)
class Peaks:
    """The two roofs of a device.

    Attributes:
        tflops: of matrix products in the dtype at hand.
        gb_s: from and to memory.
        source: where the figures are from.
    """

    tflops: float
    gb_s: float
    source: str

    def __post_init__(self) -> None:
        for name in ("tflops", "gb_s"):
            if not getattr(self, name) > 0:
                raise InvalidArgument(f"{name} = {getattr(self, name)!r} must be positive")

    def attainable_tflops(self, flops_a_byte: float) -> float:
        """The lower of both roofs."""
        return min(self.tflops, self.gb_s * flops_a_byte / 1e3)

    def or_better(self, other: "Peaks") -> "Peaks":
        """The best of two measurements: what else runs on the machine can only lower them."""
        return replace(self, tflops=max(self.tflops, other.tflops), gb_s=max(self.gb_s, other.gb_s))


def peaks_of(target: Target, dtype: str) -> Peaks | None:
    """The roofs of a device; None for a GPU whose figures are not known."""
    if target.kind == "cpu":
        return _measured(getattr(torch, dtype))
    if target.arch not in LIMITS or dtype == "float64":
        return None
    limits = limits_of(target)
    tflops = limits.float32_tflops if dtype == "float32" else limits.tflops
    return Peaks(tflops=tflops, gb_s=limits.memory_gb_s, source="data sheet")


def _measured(dtype: torch.dtype) -> Peaks:
    """The best of a few large products and copies."""
    left, right = (torch.randn(_MATMUL_SIZE, _MATMUL_SIZE).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.ones(_COPY_BYTES, dtype=torch.int8)
    copy = torch.empty_like(source)
    matmul_s = _best(lambda: torch.mm(left, right, out=product))
    copy_s = _best(lambda: copy.copy_(source))
    name = str(dtype).removeprefix("torch.")
    return Peaks(
        tflops=2 * _MATMUL_SIZE**3 / matmul_s / 1e12,
        gb_s=2 * _COPY_BYTES / copy_s / 1e9,
        source=f"measured: a {name} product of {_MATMUL_SIZE}² matrices, a copy of {_COPY_BYTES >> 20} MiB",
    )


def _best(call: Callable[[], object]) -> float:
    begun, best = time.perf_counter(), float("inf")
    for _ in range(_ROUNDS + 1):
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        best = min(best, end - start)
        if end - begun > _SLOW_S:
            break
    return best
