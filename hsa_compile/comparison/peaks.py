"""What bounds every contender on a device: a GPU's figures from its data sheet, a CPU's as measured."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from hsa_compile.checks import check_number, check_text
from hsa_compile.peaks import LIMITS, limits_of
from hsa_compile.target import Target

_PRODUCTS = ((512, 20), (2048, 3))  # sizes of square matrices, and how many times each
_COPY_BYTES, _COPIES = 256 << 20, 3  # larger than any cache
_ENOUGH_S = 1.0
_SLOW_S = 4.0  # a product that would take longer is not tried: some dtypes have no fast ones on a CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Peaks:
    """The two roofs of a device.

    Attributes:
        tflops: the rate of matrix products in the dtype at hand.
        gb_s: the rate of reading and writing memory.
        source: says where the figures are from.
    """

    tflops: float
    gb_s: float
    source: str

    def __post_init__(self) -> None:
        for name in ("tflops", "gb_s"):
            check_number(name, getattr(self, name), 1e-9, 1e12)
        check_text("source", self.source)

    def attainable_tflops(self, flops_a_byte: float) -> float:
        """Returns the lower of both roofs."""
        return min(self.tflops, self.gb_s * flops_a_byte / 1e3)

    def or_better(self, other: "Peaks") -> "Peaks":
        """Takes the best of two measurements, since what else runs on the machine can only lower them."""
        return replace(max(self, other, key=lambda peaks: peaks.tflops), gb_s=max(self.gb_s, other.gb_s))


def peaks_of(target: Target, dtype: str) -> Peaks | None:
    """Returns the roofs of a device; None for a GPU whose figures are not known."""
    if target.kind == "cpu":
        return _measured(getattr(torch, dtype))
    if target.arch not in LIMITS or dtype == "float64":
        return None
    limits = limits_of(target)
    tflops = limits.float32_tflops if dtype == "float32" else limits.tflops
    return Peaks(tflops=tflops, gb_s=limits.memory_gb_s, source="data sheet")


def _measured(dtype: torch.dtype) -> Peaks:
    """Measures the best of some products and copies.

    Short ones are among them: where other processes run, only those find a moment without.
    """
    seconds = {size: _product_s(size, dtype, rounds) for size, rounds in _PRODUCTS[:1]}
    for size, rounds in _PRODUCTS[1:]:
        if min(t * (size / other) ** 3 for other, t in seconds.items()) < _SLOW_S:
            seconds[size] = _product_s(size, dtype, rounds)
    source = torch.ones(_COPY_BYTES, dtype=torch.int8)
    copy = torch.empty_like(source)
    copy_s = _best(lambda: copy.copy_(source), _COPIES)
    name, sizes = str(dtype).removeprefix("torch."), " and ".join(f"{size}²" for size in seconds)
    return Peaks(
        tflops=max(2 * size**3 / t for size, t in seconds.items()) / 1e12,
        gb_s=2 * _COPY_BYTES / copy_s / 1e9,
        source=f"measured: {name} products of {sizes} matrices, copies of {_COPY_BYTES >> 20} MiB",
    )


def _product_s(size: int, dtype: torch.dtype, rounds: int) -> float:
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    return _best(lambda: torch.mm(left, right, out=product), rounds)


def _best(call: Callable[[], object], rounds: int) -> float:
    """Returns the seconds of the quickest of some calls, of fewer if they are slow."""
    begun, best = time.perf_counter(), float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        best = min(best, end - start)
        if end - begun > _ENOUGH_S:
            break
    return best
