"""One point of the search: a schedule made into a checked, warm, callable kernel."""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from hsa_compile.autotune.check import check
from hsa_compile.autotune.decode_check import check_decode
from hsa_compile.autotune.decode_inputs import DecodeInputs
from hsa_compile.autotune.inputs import Inputs
from hsa_compile.autotune.select_check import check_select
from hsa_compile.autotune.select_inputs import SelectInputs
from hsa_compile.errors import CompileError, OutOfResources
from hsa_compile.kernels.compile import compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import Target

# What a GPU's driver says where a compiled kernel cannot be loaded or launched; Triton's loader has no type for it.
_NO_ROOM = re.compile(r"Triton Error \[\w+\]: .*(out of memory|too many resources requested)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A schedule whose kernel gave the right answer.

    Attributes:
        schedule: its knobs.
        fingerprint: of its emitted source.
        call: runs it on the tuning inputs.
    """

    schedule: Schedule
    fingerprint: str
    call: Callable[[], object]


def prepare(
    problem: Problem, schedule: Schedule, target: Target, inputs: Inputs | SelectInputs | DecodeInputs
) -> Candidate:
    """Emits, imports and checks one schedule; running the check also warms it up.

    Raises:
        CompileError, OutOfResources, WrongResult: the candidate is out, and why.
    """
    source = emit(problem, schedule, target)
    kernel = compile_kernel(source)
    with _launch_errors(source.template):
        if isinstance(inputs, SelectInputs):
            check_select(kernel, problem, inputs)
        elif isinstance(inputs, DecodeInputs):
            check_decode(kernel, problem, inputs)
        else:
            check(kernel, problem, inputs)
    arguments, options = inputs.arguments(problem.op), inputs.options(problem.op)
    return Candidate(
        schedule=schedule,
        fingerprint=source.fingerprint,
        call=lambda: kernel.entry(*arguments, **options),
    )


@contextlib.contextmanager
def _launch_errors(template: str) -> Iterator[None]:
    """Gives the errors of a first launch, at which Triton compiles, their names in this project."""
    no_resources, no_code = _triton_errors() if template == "triton" else ((), ())
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfResources(f"not enough memory: {error}") from error
    except no_resources as error:
        raise OutOfResources(str(error)) from error
    except no_code as error:
        raise CompileError(str(error)) from error
    except RuntimeError as error:
        if not _NO_ROOM.match(str(error)):
            raise
        raise OutOfResources(str(error)) from error


def _triton_errors() -> tuple[tuple[type[Exception], ...], tuple[type[Exception], ...]]:
    """What Triton raises where a kernel does not fit, and where it cannot be compiled."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources as TritonOutOfResources
    from triton.runtime.errors import PTXASError

    return (TritonOutOfResources,), (CompilationError, PTXASError)
