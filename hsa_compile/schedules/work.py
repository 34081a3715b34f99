"""What an op does on one problem under a schedule, counted: FLOPs and bytes, for the roofline."""

from dataclasses import dataclass

from hsa_compile.peaks import Limits

OVERLAP = 0.8  # of the picks of neighbouring tokens, as in the `local` inputs; what `union` saves hangs on it


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one op on one problem does under a schedule.

    Attributes:
        flops: of all matrix products, padding not counted.
        memory_bytes: every tensor once, as if the cache held the rest.
        cache_bytes: what the programs read and write, from wherever it comes.
    """

    flops: float
    memory_bytes: float
    cache_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One kernel of an op and its work, padding included.

    Attributes:
        flops: of its matrix products.
        cache_bytes, memory_bytes: what it moves, through the shared cache and beyond it.
        programs: of one launch.
        launches: how often it is launched.
        rows: of a tile.
        warps, stages: of a program.
    """

    flops: float
    cache_bytes: float
    memory_bytes: float
    programs: float
    launches: int
    rows: int
    warps: int
    stages: int


def clocks(work: Work, itemsize: int, limits: Limits) -> dict[str, float]:
    """Milliseconds that each part of a device needs at its peak: `matrix`, `memory`, `cache`; the slowest is a bound.

    Args:
        work: of one or several ops.
        itemsize: bytes of an element, which decides between the peaks of products.
        limits: of the device.
    """
    peak = limits.float32_tflops if itemsize == 4 else limits.tflops
    return {
        "matrix": work.flops / (peak * 1e9),
        "memory": work.memory_bytes / (limits.memory_gb_s * 1e6),
        "cache": work.cache_bytes / (limits.cache_gb_s * 1e6),
    }
