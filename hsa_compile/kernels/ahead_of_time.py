"""Compiles emitted Triton kernels for a GPU that need not be there, and reads from the result what they use of it."""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hsa_compile.errors import CompileError, OutOfResources, compile_error
from hsa_compile.target import Target

if TYPE_CHECKING:
    from triton.compiler import ASTSource, CompiledKernel

# The matrix instruction that tells each generation apart, newest first, as its assembly text spells it.
MATRIX_INSTRUCTIONS = (
    ("UTCHMMA", "tcgen05.mma"),
    ("HGMMA", "wgmma.mma_async"),
    ("HMMA", "mma.sync"),
    ("MFMA", "v_mfma"),
)
# The tensor memory of a Blackwell SM, in columns.
MAX_TENSOR_MEMORY = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelResources:
    """What one compiled kernel uses of its device.

    Attributes:
        name: the kernel's function.
        registers: how many vector registers a thread has.
        spills: the bytes of a thread's registers that live in memory instead; 0 is best.
        shared_memory: the bytes of shared memory (LDS) that a program has.
        num_warps: how many warps (wavefronts) a program has.
        matrix_instruction: what the products run on: `UTCHMMA`, `HGMMA`, `HMMA`, `MFMA` or `none`.
        asm: the compiler's texts by name, such as `ttgir`, `ptx`, `amdgcn`.
    """

    name: str
    registers: int
    spills: int
    shared_memory: int
    num_warps: int
    matrix_instruction: str
    asm: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)


def compile_launches(module: ModuleType, target: Target, *, sass: bool = False) -> tuple[KernelResources, ...]:
    """Compiles every kernel of an emitted Triton module for `target`; no GPU is needed.

    Args:
        module: an imported module with a `LAUNCHES` tuple.
        target: a `cuda` or `hip` target.
        sass: whether to disassemble the machine code of a `cuda` target too, which takes longer than compiling.

    Raises:
        CompileError: the compiler refused a kernel, or Triton runs as an interpreter in this process.
        OutOfResources: a kernel needs more shared or tensor memory than the target has.
    """
    return tuple(_compile_launch(launch, target, sass) for launch in module.LAUNCHES)


def _compile_launch(launch: Mapping[str, Any], target: Target, sass: bool) -> KernelResources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import PTXASError

    kernel = launch["kernel"]
    if not isinstance(kernel, triton.JITFunction):
        raise CompileError(f"{kernel.__name__} runs in Triton's interpreter (TRITON_INTERPRET): it cannot be compiled")
    arch = int(target.arch.removeprefix("sm_")) if target.kind == "cuda" else target.arch
    try:
        compiled = triton.compile(
            source_of(launch),
            target=GPUTarget(target.kind, arch, target.warp_size),
            options={"num_warps": launch["num_warps"], "num_stages": launch["num_stages"]},
        )
    # Triton's passes and LLVM raise RuntimeError; the assembler has an error of its own.
    except (CompilationError, PTXASError, RuntimeError) as error:
        raise compile_error(f"{kernel.__name__} does not compile for {target.arch}: {error}") from error
    if sass and target.kind == "cuda":
        compiled.asm["sass"]  # Triton disassembles when this is first asked for
    resources = _cuda_resources(compiled) if target.kind == "cuda" else _hip_resources(compiled)
    _check_limits(resources, compiled, target)
    return resources


def source_of(launch: Mapping[str, Any]) -> "ASTSource":
    """Returns what a launch compiles: the kernel, the types of its arguments, and what is known of their values.

    Sizes are not specialised on (`do_not_specialize`), and PyTorch's allocations are 16-byte aligned: so the first
    launch finds in Triton's cache what was compiled ahead, and every length runs the same kernel.
    """
    import triton
    from triton.compiler import ASTSource

    kernel, wide, constants = launch["kernel"], launch.get("aligned", ()), launch.get("constants", {})
    signature = {name: launch["signature"][name] for name in kernel.arg_names}
    known: dict[tuple[int], list[list[object]]] = {}
    for i, (name, kind) in enumerate(signature.items()):
        if kind.startswith("*") or name in wide:
            known[i,] = [["tt.divisibility", 16]]
        elif name in constants and not triton.__version__.startswith("3.6."):
            known[i,] = []  # as a launch of Triton 3.7 says it, for the key has to be the same
    return ASTSource(kernel, signature, constants, known)


def _check_limits(resources: KernelResources, compiled: "CompiledKernel", target: Target) -> None:
    if resources.shared_memory > target.shared_memory:
        raise OutOfResources(
            f"{resources.name} needs {resources.shared_memory} bytes of shared memory; "
            f"{target.name} has {target.shared_memory}"
        )
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    if tensor_memory > MAX_TENSOR_MEMORY:
        raise OutOfResources(
            f"{resources.name} needs {tensor_memory} columns of tensor memory; {target.name} has {MAX_TENSOR_MEMORY}"
        )


def _cuda_resources(compiled: "CompiledKernel") -> KernelResources:
    usage = _cuobjdump(compiled.asm["cubin"])
    # Emitted kernels have no local arrays, so all that lies on the stack was spilled there.
    return _resources(
        compiled,
        assembly="ptx",
        registers=_number(usage, r"REG:(\d+)"),
        spills=_number(usage, r"STACK:(\d+)") + _number(usage, r"LOCAL:(\d+)"),
    )


def _hip_resources(compiled: "CompiledKernel") -> KernelResources:
    text = compiled.asm["amdgcn"]
    return _resources(
        compiled,
        assembly="amdgcn",
        registers=_number(text, r"\.vgpr_count:\s*(\d+)"),
        # A scalar register that does not fit moves into a lane of a vector register, not into memory.
        spills=4 * _number(text, r"\.vgpr_spill_count:\s*(\d+)"),
    )


def _resources(compiled: "CompiledKernel", *, assembly: str, registers: int, spills: int) -> KernelResources:
    text = compiled.asm[assembly]
    return KernelResources(
        name=compiled.metadata.name,
        registers=registers,
        spills=spills,
        shared_memory=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        matrix_instruction=next((name for name, spelling in MATRIX_INSTRUCTIONS if spelling in text), "none"),
        asm={name: text for name, text in compiled.asm.items() if isinstance(text, str)},
    )


def _cuobjdump(cubin: bytes) -> str:
    """Returns what the tool in Triton's wheel prints about a cubin: `… REG:96 STACK:0 SHARED:0 LOCAL:0 …`."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise CompileError(f"cuobjdump cannot read the compiled kernel: {result.stderr.strip()}")
    return result.stdout


def _number(text: str, pattern: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise CompileError(f"the compiler's report has no {pattern!r}")
    return int(match.group(1))
