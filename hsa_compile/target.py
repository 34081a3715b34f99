"""The device that a kernel is made for: the one at hand, or a named one that need not be there.

PyTorch is loaded only to look at the device at hand: the command line reads names of devices before it runs anything.
"""

import functools
import os
import platform
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsa_compile.checks import MAX_TEXT, check_choice, check_count, check_flag, check_text
from hsa_compile.errors import InvalidTarget
from hsa_compile.paths import cxx_compiler

if TYPE_CHECKING:
    import torch

KINDS = ("cuda", "hip", "cpu")
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A device, described by what schedules and emitted kernels depend on.

    Attributes:
        kind: `cuda`, `hip` or `cpu`.
        name: the product's name, or the architecture where only that is known.
        arch: `sm_90`, `gfx942`; on a CPU the vector extension, `avx512`.
        num_cores: streaming multiprocessors, compute units, or CPU cores of this process.
        shared_memory: bytes of shared memory (LDS) that one program can use; 0 on a CPU.
        warp_size: threads of a warp (wavefront); 1 on a CPU.
        has_compiler: whether emitted C++ can be built, on a CPU.
    """

    kind: str
    name: str
    arch: str
    num_cores: int
    shared_memory: int = 0
    warp_size: int = 1
    has_compiler: bool = False

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS, error=InvalidTarget)
        for name in ("name", "arch"):
            check_text(name, getattr(self, name), error=InvalidTarget)
        for name, low, high in (("num_cores", 1, 2**20), ("shared_memory", 0, 2**40), ("warp_size", 1, 2**10)):
            check_count(name, getattr(self, name), low, high, error=InvalidTarget)
        check_flag("has_compiler", self.has_compiler, error=InvalidTarget)

    @property
    def slug(self) -> str:
        """A file name for this device, in small letters, digits and hyphens."""
        text = self.name if self.kind != "cpu" else f"cpu {self.name} {self.arch}"
        return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, ready for JSON."""
        return asdict(self)

    @staticmethod
    def current() -> "Target":
        """Returns the first GPU if there is one, else this CPU. It is called at use, never at import."""
        import torch

        return Target.of(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))

    @staticmethod
    def of(device: "torch.device") -> "Target":
        """Returns the target that a tensor's device is.

        Raises:
            InvalidTarget: no kernels can be made for that type of device, or it is not present.
        """
        import torch

        if device.type == "cpu":
            return this_cpu(torch.get_num_threads())
        if device.type == "cuda":
            is_current = device.index is None and torch.cuda.is_available()
            return _gpu(torch.cuda.current_device() if is_current else device.index or 0)
        raise InvalidTarget(f"device {str(device)!r} is not supported; supported are cpu and cuda (NVIDIA or AMD)")

    @staticmethod
    def parse(text: str) -> "Target":
        """Returns the target that a name stands for.

        The names `auto`, `cpu`, `cuda` and `cuda:1` stand for devices that must be present. An architecture (`sm_90`)
        or a product (`h100`) need not be.

        Raises:
            InvalidTarget: the name is unknown, or names a device that is not present.
        """
        if text == "auto":
            return Target.current()
        if named := NAMED_TARGETS.get(text) or PRODUCTS.get(text):
            return named
        if text in ("cpu", "cuda"):
            import torch

            return Target.of(torch.device(text))
        if (index := gpu_index(text)) is not None:
            return _gpu(index)
        allowed = ", ".join(("auto", "cpu", "cuda", "cuda:N", *NAMED_TARGETS, *PRODUCTS))
        raise InvalidTarget(f"device {text!r} is not known; allowed are {allowed}")


def gpu_index(text: str) -> int | None:
    """Returns the number of the GPU that `cuda:N` names, without leading zeros; None where a text is no such name."""
    return int(text.removeprefix("cuda:")) if re.fullmatch(r"cuda:(0|[1-9][0-9]{0,2})", text) else None


def _named(kind: str, name: str, arch: str, num_cores: int, shared_memory: int, warp_size: int) -> Target:
    return Target(
        kind=kind, name=name, arch=arch, num_cores=num_cores, shared_memory=shared_memory, warp_size=warp_size
    )


# Each architecture stands for its data-centre part: A100, H100 SXM, B200, MI300X. Shared memory is what one block
# may opt in to (CUDA programming guide, table of compute capabilities; CDNA 3 ISA guide).
NAMED_TARGETS = {
    "sm_80": _named("cuda", "sm_80", "sm_80", 108, 163 * 1024, 32),
    "sm_90": _named("cuda", "sm_90", "sm_90", 132, 227 * 1024, 32),
    "sm_100": _named("cuda", "sm_100", "sm_100", 148, 227 * 1024, 32),
    "gfx942": _named("hip", "gfx942", "gfx942", 304, 64 * 1024, 64),
}


# Products have the names that their drivers give them, so that what is stored for one is found on it.
PRODUCTS = {
    "a100": replace(NAMED_TARGETS["sm_80"], name="NVIDIA A100-SXM4-80GB"),
    "h100": replace(NAMED_TARGETS["sm_90"], name="NVIDIA H100 80GB HBM3"),
    "h200": replace(NAMED_TARGETS["sm_90"], name="NVIDIA H200"),
    "b200": replace(NAMED_TARGETS["sm_100"], name="NVIDIA B200"),
    "mi300x": replace(NAMED_TARGETS["gfx942"], name="AMD Instinct MI300X"),
}


@functools.cache
def this_cpu(num_threads: int) -> Target:
    """Returns this machine's CPU with so many threads; it is remembered, since each call of an op asks for it."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability().lower().replace("default", "scalar")
    return Target(
        kind="cpu",
        name=_cpu_name(),
        arch=capability,
        num_cores=num_threads,
        has_compiler=cxx_compiler() is not None,
    )


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Returns whether this CPU has units for products of bfloat16, and PyTorch may use its vector extension.

    Without them such a product is emulated: on a CPU with AVX2 alone it takes 23 times as long as one of float32.
    """
    if platform.machine().lower() in ("aarch64", "arm64"):
        return "bf16" in _cpuinfo("Features").split()
    import torch

    # `ATEN_CPU_CAPABILITY=avx2` makes PyTorch leave AVX-512 alone, and AMX is beyond that.
    flags = {"avx512_bf16", "amx_bf16"} & set(_cpuinfo("flags").split())
    return bool(flags) and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _cpu_name() -> str:
    name = _cpuinfo("model name") or platform.processor() or platform.machine() or os.name
    return "".join(filter(str.isprintable, name))[:MAX_TEXT]


def _cpuinfo(field: str) -> str:
    """Returns what Linux says about the first core; an empty text where it says nothing."""
    text = CPUINFO.read_text() if CPUINFO.exists() else ""
    match = re.search(rf"^{field}\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else ""


@functools.cache
def _gpu(index: int) -> Target:
    import torch

    if not torch.cuda.is_available():
        raise InvalidTarget(f"device 'cuda:{index}' is not present: PyTorch finds no GPU; use cpu")
    if index >= torch.cuda.device_count():
        raise InvalidTarget(f"device 'cuda:{index}' is not present: there are {torch.cuda.device_count()}")
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch, kind = properties.gcnArchName.split(":")[0], "hip"
    else:
        arch, kind = f"sm_{properties.major}{properties.minor}", "cuda"
    known = NAMED_TARGETS.get(arch)
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or (known.shared_memory if known else 48 * 1024)
    return Target(
        kind=kind,
        name=properties.name,
        arch=arch,
        num_cores=properties.multi_processor_count,
        shared_memory=shared,
        warp_size=properties.warp_size,
    )
