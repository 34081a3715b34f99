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
_ROUNDS = 3
_PROBE_SIZE, _SLOW_S = 256, 4.0  # by which the large product is found to take too long


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
        return replace(max(self, other, key=lambda peaks: peaks.tflops), gb_s=max(self.gb_s, other.gb_s))


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
    """The best of a few large products and copies; of smaller products in a dtype that a CPU has no fast ones of."""
    size = min(_PROBE_SIZE, _MATMUL_SIZE)
    matmul_s = _product_s(size, dtype)
    if size < _MATMUL_SIZE and matmul_s * (_MATMUL_SIZE / size) ** 3 < _SLOW_S:
        size = _MATMUL_SIZE
        matmul_s = _product_s(size, dtype)
    source = torch.ones(_COPY_BYTES, dtype=torch.int8)
    copy = torch.empty_like(source)
    copy_s = _best(lambda: copy.copy_(source))
    name = str(dtype).removeprefix("torch.")
    return Peaks(
        tflops=2 * size**3 / matmul_s / 1e12,
        gb_s=2 * _COPY_BYTES / copy_s / 1e9,
        source=f"measured: a {name} product of {size}² matrices, a copy of {_COPY_BYTES >> 20} MiB",
    )


def _product_s(size: int, dtype: torch.dtype) -> float:
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    return _best(lambda: torch.mm(left, right, out=product))


def _best(call: Callable[[], object]) -> float:
    """Seconds of the quickest of some calls."""
    best = float("inf")
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
