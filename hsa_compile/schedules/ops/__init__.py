"""The schedules of all ops: one table leads from an op and a backend to its knobs, constraints, defaults and cost.

Which templates a schedule was tuned for is said here, too: other text has another best schedule.
"""

import functools
import hashlib

from hsa_compile.paths import TEMPLATE_DIR
from hsa_compile.problem import Problem
from hsa_compile.schedules.ops import hsa_decode, select_chunks
from hsa_compile.schedules.ops.backend import OpBackend, Work
from hsa_compile.schedules.ops.hsa_attention import cpp, torch, triton
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import Target

_CPP_DTYPES = ("float32", "bfloat16")

OP_BACKENDS: dict[tuple[str, str], OpBackend] = {
    ("hsa_forward", "torch"): torch.FORWARD,
    ("hsa_forward", "cpp"): cpp.FORWARD,
    ("hsa_forward", "triton"): triton.FORWARD,
    ("hsa_backward", "torch"): torch.BACKWARD,
    ("hsa_backward", "cpp"): cpp.BACKWARD,
    ("hsa_backward", "triton"): triton.BACKWARD,
    ("select_chunks", "torch"): select_chunks.TORCH,
    ("select_chunks", "cpp"): select_chunks.CPP,
    ("select_chunks", "triton"): select_chunks.TRITON,
    ("select_chunks_backward", "torch"): select_chunks.TORCH_BACKWARD,
    ("select_chunks_backward", "cpp"): select_chunks.CPP_BACKWARD,
    ("select_chunks_backward", "triton"): select_chunks.TRITON_BACKWARD,
    ("hsa_decode", "torch"): hsa_decode.TORCH,
    ("hsa_decode", "cpp"): hsa_decode.CPP,
    ("hsa_decode", "triton"): hsa_decode.TRITON,
}


def backend_for(problem: Problem, target: Target) -> str:
    """Returns the backend that serves a problem: `triton` on a GPU, `cpp` where the op has it and it can be built.

    Elsewhere it is `torch`, with which every op begins.
    """
    if target.kind != "cpu":
        return "triton"
    has_cpp = (problem.op, "cpp") in OP_BACKENDS and problem.dtype in _CPP_DTYPES
    return "cpp" if has_cpp and target.has_compiler else "torch"


def op_backend(problem: Problem, target: Target) -> OpBackend:
    """Returns what the table holds for the problem's op on the backend that serves it.

    Raises:
        KeyError: the table has no entry for the op on that backend, which is a fault of the table.
    """
    return OP_BACKENDS[problem.op, backend_for(problem, target)]


def count_work(problem: Problem, schedule: Schedule) -> Work:
    """Returns the FLOPs and bytes of a problem under a schedule when all slots are filled, alike on every backend."""
    return OP_BACKENDS[problem.op, "torch"].work(problem, schedule)


def source_version(problem: Problem, target: Target) -> str:
    """Returns 12 hex digits that stand for the templates of a problem's op on a target."""
    return _digest(backend_for(problem, target), problem.op)


@functools.cache
def _digest(backend: str, op: str) -> str:
    """Digests the templates in the op's own folder and in `parts`, which all ops share."""
    digest = hashlib.sha256()
    folder = TEMPLATE_DIR / backend
    for path in sorted(folder.rglob("*.jinja")):
        name = path.relative_to(folder).as_posix()
        if name.partition("/")[0] in (op, "parts"):
            digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
