"""Turns a problem and a schedule into the source text of a kernel; equal arguments give the same bytes every time."""

import functools
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hsa_compile.errors import InvalidSchedule
from hsa_compile.paths import TEMPLATE_DIR
from hsa_compile.problem import Problem, next_power_of_2
from hsa_compile.schedules.ops import backend_for
from hsa_compile.schedules.ops.limits import fused_step, vector_lanes
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.target import Target

if TYPE_CHECKING:
    import jinja2


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSource:
    """An emitted Python module, or a C++ file.

    Attributes:
        problem, schedule, target: what the kernel was emitted for.
        backend: what it is written in: `triton`, `cpp` or `torch`.
        text: the source text.
        entry: the name of the function to call, which is the op's.
        fingerprint: 16 hex digits of the text's SHA-256.
    """

    problem: Problem
    schedule: Schedule
    target: Target
    backend: str
    text: str
    entry: str
    fingerprint: str


def emit(problem: Problem, schedule: Schedule, target: Target) -> KernelSource:
    """Emits the kernel of `problem.op` under `schedule`: Triton for a GPU, C++ or PyTorch for a CPU.

    Lengths, batch and number of heads are arguments of the emitted function: the text depends only on dtype, head
    dims, chunk size, group, options and, where picks are sorted, top-k, so one file serves all lengths.

    Raises:
        InvalidSchedule: the schedule is not in the search space of this problem and target; the message says why.
    """
    if reason := SearchSpace.of(problem, target).why_invalid(schedule):
        raise InvalidSchedule(f"schedule '{schedule}' cannot run {problem.describe()} on {target.arch}: {reason}")
    backend = backend_for(problem, target)
    suffix = "cpp" if backend == "cpp" else "py"
    template = _environment().get_template(f"{backend}/{problem.op}/{schedule.dataflow}.{suffix}.jinja")
    header = _header(problem, schedule, target, comment=suffix == "cpp")
    text = template.render(problem=problem, schedule=schedule, target=target, header=header)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
    return KernelSource(
        problem=problem,
        schedule=schedule,
        target=target,
        backend=backend,
        text=text,
        entry=problem.op,
        fingerprint=fingerprint,
    )


def _header(problem: Problem, schedule: Schedule, target: Target, *, comment: bool) -> str:
    device = "cpu" if target.kind == "cpu" and not comment else f"{target.kind} {target.arch}"
    lines = [
        f"{problem.op}, dataflow {schedule.dataflow}: emitted by hsa-compile, do not edit.",
        "",
        f"problem   {problem.describe_kernel()}",
        f"schedule  {schedule}",
        f"target    {device}",
    ]
    if comment:
        return "".join(f"// {line}".rstrip() + "\n" for line in lines)
    return '"""' + "\n".join(lines) + '\n"""\n'


@functools.cache
def _environment() -> "jinja2.Environment":
    # Imported here: jinja2 takes a third of the import budget, and a process that finds its kernels needs it once.
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE_DIR),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.globals.update(fused_step=fused_step, next_power_of_2=next_power_of_2, vector_lanes=vector_lanes)
    return environment
