"""From a problem to its running kernel: look the schedule up, emit, import. It never tunes."""

import logging
import warnings
from collections.abc import Callable, Hashable
from dataclasses import replace

from hsa_compile.errors import CompileError, HSACompileWarning, UntunedWarning
from hsa_compile.kernels.compile import Kernel, compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.problem import Problem
from hsa_compile.schedules.cache import default_cache
from hsa_compile.schedules.default import default_schedule
from hsa_compile.schedules.space import template_for
from hsa_compile.target import Target

_log = logging.getLogger("hsa_compile")
_warned: set[Hashable] = set()

_MAX_REMEMBERED = 4096
_kernels: dict[Hashable, Kernel] = {}


def remembered(key: Hashable, target: Target, problem: Callable[[], Problem]) -> Kernel:
    """The kernel for a call of an op: a dictionary access, except the first time.

    Args:
        key: whatever the problem depends on, quick to make from the arguments of the call.
        target: of the tensors' device.
        problem: what to resolve if nothing is known under that key.
    """
    known = (key, target, default_cache().generation)
    kernel = _kernels.get(known)
    if kernel is None:
        if len(_kernels) >= _MAX_REMEMBERED:  # lengths that never repeat must not grow memory without bound
            _kernels.clear()
        kernel = _kernels[known] = resolve(problem(), target)
    return kernel


def resolve(problem: Problem, target: Target) -> Kernel:
    """The kernel for a problem, under the best schedule that is known: exact, pretuned, nearest, default.

    Warns once for each kind of problem that has to run on the default schedule.
    """
    found = default_cache().lookup(problem, target)
    if found is None:
        schedule = default_schedule(problem, target)
        _warn_untuned(problem, target)
    else:
        schedule = found.schedule
        _log.debug("%s: %s entry at distance %.2f: %s", problem.describe(), found.origin, found.distance, schedule)
    try:
        return compile_kernel(emit(problem, schedule, target))
    except CompileError as error:
        if template_for(problem, target) != "cpp":
            raise
        warnings.warn(f"{error}; the slower PyTorch kernel runs instead", HSACompileWarning, stacklevel=4)
        return resolve(problem, replace(target, has_compiler=False))


def _warn_untuned(problem: Problem, target: Target) -> None:
    kind = (
        target, problem.selects, problem.decodes, problem.dtype, problem.head_dim, problem.value_dim,
        problem.chunk_size, problem.group,
    )  # fmt: skip
    # The backward of select_chunks has next to nothing to tune.
    if kind in _warned or problem.op == "select_chunks_backward":
        return
    _warned.add(kind)
    device = "cpu" if target.kind == "cpu" else "cuda"
    if problem.selects:
        device += " --op select"
    if problem.decodes:
        device += " --op decode"
    seq_len = problem.kv_len if problem.decodes else problem.seq_len  # as `tune` takes it
    warnings.warn(
        f"no tuned schedule for {problem.describe()} on {target.name}, the default runs; tune it with: "
        f"hsa-compile tune --device {device} --batch {problem.batch} --seq-len {seq_len} "
        f"--heads {problem.num_heads} --kv-heads {problem.num_kv_heads} --head-dim {problem.head_dim} "
        f"--chunk-size {problem.chunk_size} --top-k {problem.top_k} --dtype {problem.dtype}",
        UntunedWarning,
        stacklevel=5,
    )
