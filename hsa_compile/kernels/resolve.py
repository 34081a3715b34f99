"""Finds the kernel that a problem runs on: looks the schedule up, emits the source, imports it. It never tunes."""

import logging
from collections.abc import Callable, Hashable
from dataclasses import replace

from hsa_compile.errors import (
    CacheError,
    CompileError,
    CompileTimedOut,
    DistantWarning,
    HSACompileError,
    HSACompileWarning,
    UntunedWarning,
    warn_user,
)
from hsa_compile.kernels.compile import Kernel, compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.log import logger
from hsa_compile.problem import Problem
from hsa_compile.schedules.cache import default_cache
from hsa_compile.schedules.lookup import Lookup
from hsa_compile.schedules.ops import backend_for
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import default_schedule
from hsa_compile.target import Target

OnMiss = Callable[[Problem, Target], None]

_warned: set[Hashable] = set()

_MAX_REMEMBERED = 4096
_kernels: dict[Hashable, Kernel] = {}

_on_miss: OnMiss | None = None
_missed: set[tuple[Problem, Target]] = set()


def set_on_miss(callback: OnMiss | None) -> None:
    """Sets what is called once for each problem that has no measured entry of its own, before the next best is taken.

    The callback may put an entry into the cache, which is looked up again afterwards. If it raises an error of this
    project, a warning says so, and the next best runs. None, the default, does nothing.
    """
    global _on_miss
    _on_miss = callback
    _missed.clear()
    _kernels.clear()


def remembered(key: Hashable, target: Target, problem: Callable[[], Problem]) -> Kernel:
    """Returns the kernel for a call of an op: a dictionary access, except the first time.

    Args:
        key: everything that the problem depends on, in a form that is quick to make from the arguments of the call.
        target: the device that the tensors are on.
        problem: makes the problem, which is resolved if nothing is known under that key.
    """
    known = (key, target, default_cache().generation)
    kernel = _kernels.get(known)
    if kernel is None:
        if len(_kernels) >= _MAX_REMEMBERED:  # lengths that never repeat must not grow memory without bound
            _kernels.clear()
        kernel = _kernels[known] = resolve(problem(), target)
    return kernel


def resolve(problem: Problem, target: Target) -> Kernel:
    """Returns the kernel for a problem, under the best schedule that is known: exact, pretuned, nearest, default.

    It warns once for each kind of problem that has to run on the default schedule, or on one tuned so far away that
    nobody measured what that costs.
    """
    return _resolve(problem, target, _on_miss)


def _resolve(problem: Problem, target: Target, on_miss: OnMiss | None) -> Kernel:
    schedule = _schedule(problem, target, on_miss)
    try:
        return compile_kernel(emit(problem, schedule, target))
    except (CompileError, CompileTimedOut, CacheError) as error:
        if backend_for(problem, target) != "cpp":
            raise
        if (text := f"{error}; the slower PyTorch kernel runs instead") not in _warned:
            _warned.add(text)
            warn_user(text, HSACompileWarning)
        # The callback for a miss would tune for the device as it is, not as it would be without its compiler.
        return _resolve(problem, replace(target, has_compiler=False), None)


def _schedule(problem: Problem, target: Target, on_miss: OnMiss | None) -> Schedule:
    found = _lookup(problem, target, on_miss)
    schedule = found.schedule if found else default_schedule(problem, target)
    if logger.isEnabledFor(logging.DEBUG):  # to explain takes longer than to look up
        why = default_cache().explain_miss(problem, target)
        logger.debug("%s on %s runs %s: %s", problem.describe(), target.name, schedule, why)
    if found is None:
        _warn_once(problem, target, f"no tuned schedule for {problem.describe()} on {target.name}, the default runs")
    elif found.regret is None:
        _warn_once(
            problem,
            target,
            f"{problem.describe()} on {target.name} runs on the schedule of {found.record.problem.describe()} on "
            f"{found.record.target.name}; how much slower that is at distance {found.distance:.1f} is not known",
            DistantWarning,
        )
    return schedule


def _lookup(problem: Problem, target: Target, on_miss: OnMiss | None) -> Lookup | None:
    found = default_cache().lookup(problem, target)
    if on_miss is None or (found and found.distance == 0 and not found.is_predicted):
        return found
    asked = (problem.bucketed(), target)
    if asked in _missed:
        return found
    _missed.add(asked)  # before the call, which may itself run a kernel
    logger.info("%s: a miss, handed to %s", problem.describe(), getattr(on_miss, "__name__", on_miss))
    try:
        on_miss(problem, target)
    except HSACompileError as error:  # a run that could go on must not end here
        warn_user(f"{problem.describe()} could not be tuned: {error}", HSACompileWarning)
    return default_cache().lookup(problem, target)


def _warn_once(problem: Problem, target: Target, what: str, category: type[UntunedWarning] = UntunedWarning) -> None:
    """Says what is missing and which command tunes it, once for each kind of problem."""
    kind = (target, problem.family if problem.stands_for_layer else problem.op, problem.describe_kernel())
    # The backward of select_chunks has next to nothing to tune.
    if kind in _warned or problem.op == "select_chunks_backward":
        return
    _warned.add(kind)
    device = "cpu" if target.kind == "cpu" else "cuda"
    warn_user(
        f"{what}; tune it with: hsa-compile tune --device {device} {problem.tune_flags()}",
        category,
    )
