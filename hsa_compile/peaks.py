"""The peak figures of devices, from their data sheets: the one table behind predictions, plots and `model info`."""

from dataclasses import dataclass, replace

from hsa_compile.errors import InvalidTarget
from hsa_compile.target import PRODUCTS, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of one device, which bound every kernel on it: the vendors' peak figures, without sparsity.

    Attributes:
        tflops: the rate of 16-bit matrix products.
        float32_tflops: the rate of float32 products that keep all bits.
        memory_gb_s, cache_gb_s: bandwidth of device memory and of the last cache that all programs share.
        cache_mb: size of that cache.
        clock_mhz: boost clock, at which the peaks hold.
        registers, threads, programs: what the resident programs of one multiprocessor share.
        shared_memory: bytes of shared memory that one multiprocessor has.
        register_unit: registers are given to a warp in steps of this many for each thread.
        memory_gb: size of device memory, in 10⁹ bytes.
        scale_up_gb_s: bandwidth to the other devices of a node, over NVLink or Infinity Fabric, one way.
        host_gb_s: bandwidth to the host's memory, over PCIe x16, one way.
    """

    tflops: float
    float32_tflops: float
    memory_gb_s: float
    cache_gb_s: float
    cache_mb: float
    clock_mhz: int
    registers: int
    threads: int
    programs: int
    shared_memory: int
    register_unit: int = 8
    memory_gb: float
    scale_up_gb_s: float
    host_gb_s: float


_NVIDIA = {"registers": 65536, "threads": 2048, "programs": 32}
_CDNA3 = {"registers": 4 * 512 * 64, "threads": 4 * 10 * 64, "programs": 16, "shared_memory": 64 * 1024}

# The limits by architecture: A100 SXM 80 GB, H100 SXM, B200, MI300X. Sources: NVIDIA A100, H100, H200 and Blackwell
# (HGX B200) data sheets and architecture white papers, CUDA programming guide (table of compute capabilities); AMD
# Instinct MI300X data sheet and CDNA 3 white paper. Vendors publish no cache bandwidths: others measured these, and
# they are rounded.
# Links are half of the two-way figures of the same data sheets: NVLink 3, 4 and 5 (600, 900 and 1,800 GB/s), seven
# Infinity Fabric links (896 GB/s); PCIe 4 and 5 x16 (64 and 128 GB/s).
LIMITS = {
    "sm_80": Limits(tflops=312, float32_tflops=19.5, memory_gb_s=2039, cache_gb_s=4700, cache_mb=40, clock_mhz=1410,
                    shared_memory=164 * 1024, memory_gb=80, scale_up_gb_s=300, host_gb_s=32, **_NVIDIA),
    "sm_90": Limits(tflops=989, float32_tflops=67, memory_gb_s=3350, cache_gb_s=5600, cache_mb=50, clock_mhz=1830,
                    shared_memory=228 * 1024, memory_gb=80, scale_up_gb_s=450, host_gb_s=64, **_NVIDIA),
    "sm_100": Limits(tflops=2250, float32_tflops=75, memory_gb_s=8000, cache_gb_s=10000, cache_mb=126, clock_mhz=1965,
                     shared_memory=228 * 1024, memory_gb=180, scale_up_gb_s=900, host_gb_s=64, **_NVIDIA),
    "gfx942": Limits(tflops=1307, float32_tflops=163, memory_gb_s=5300, cache_gb_s=11900, cache_mb=256, clock_mhz=2100,
                     memory_gb=192, scale_up_gb_s=448, host_gb_s=64, **_CDNA3),
}  # fmt: skip
# Some products differ from the one that stands for their architecture above.
_PRODUCT_LIMITS = {PRODUCTS["h200"].name: replace(LIMITS["sm_90"], memory_gb_s=4800, memory_gb=141)}


def limits_of(target: Target) -> Limits:
    """Returns the limits of a target: those of its product, else those of its architecture.

    Raises:
        InvalidTarget: the limits of the architecture are not known.
    """
    if target.arch not in LIMITS:
        raise InvalidTarget(f"peaks of {target.arch} are not known; known are {', '.join(LIMITS)}")
    return _PRODUCT_LIMITS.get(target.name, LIMITS[target.arch])
