"""What all kernels of one candidate use of a device together: for rejecting early, and for choosing among equals."""

from collections.abc import Sequence
from dataclasses import dataclass

from hsa_compile.autotune.cost.roofline import occupancy
from hsa_compile.kernels.ahead_of_time import KernelResources
from hsa_compile.peaks import LIMITS
from hsa_compile.target import Target

MAX_MORE_SPILLS = 128  # bytes of a thread, over what the default spills


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """The worst of a candidate's kernels in each respect.

    Attributes:
        spills: bytes of a thread's registers that live in memory.
        registers: of a thread.
        shared_memory: bytes of a program.
        occupancy: share of a multiprocessor's threads that are resident, 0 … 1; None if its limits are not known.
    """

    spills: int = 0
    registers: int = 0
    shared_memory: int = 0
    occupancy: float | None = None

    @staticmethod
    def of(kernels: Sequence[KernelResources], target: Target) -> "Resources":
        """Sums spills, and takes the largest of registers and shared memory and the least occupancy."""
        known = target.arch in LIMITS
        return Resources(
            spills=sum(kernel.spills for kernel in kernels),
            registers=max(kernel.registers for kernel in kernels),
            shared_memory=max(kernel.shared_memory for kernel in kernels),
            occupancy=min(occupancy(kernel, target) for kernel in kernels) if known else None,
        )

    def why_hopeless(self, default: "Resources") -> str | None:
        """Why a candidate that uses this need not be run, or None if it may be good."""
        if self.spills > default.spills + MAX_MORE_SPILLS:
            return f"it spills {self.spills} bytes of a thread, the default {default.spills}"
        if self.occupancy == 0:
            return "not one program of it fits on a multiprocessor"
        return None
