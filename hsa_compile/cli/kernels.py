"""`hsa-compile emit` and `inspect`: read a kernel, and compile it for a named GPU that need not be there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hsa_compile.autotune.cost.roofline import occupancy, predict
from hsa_compile.cli.options import (
    OP_NAMES,
    SHAPE_NAMES,
    RestrictedOption,
    asked_problems,
    expand,
    json_option,
    print_rows,
    problem_options,
)
from hsa_compile.errors import CacheError, InvalidArgument
from hsa_compile.kernels.emit import emit as emit_source
from hsa_compile.log import progress_bar
from hsa_compile.problem import Problem
from hsa_compile.schedules.cache import default_cache
from hsa_compile.schedules.ops import count_work
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import default_schedule
from hsa_compile.target import NAMED_TARGETS, PRODUCTS, Target

if TYPE_CHECKING:
    from hsa_compile.kernels.ahead_of_time import KernelResources


# At none of these points may a default schedule spill registers.
_MATRIX_DTYPES, _MATRIX_HEAD_DIMS = ("bfloat16", "float16"), (64, 128)
_MATRIX_GROUPS, _MATRIX_CHUNKS = (1, 4, 16), (32, 64, 128)
_LEGEND = {
    "kernel": "the kernel's name; an op may launch several",
    "shape": "dtype, group G, head dim D, chunk size C",
    "schedule": "the schedule that it was emitted for",
    "registers": "how many registers a thread has",
    "spills": "bytes of a thread's registers that lie in memory; 0 is good",
    "shared KB": "shared memory of a program, in KiB",
    "occupancy": "share of a multiprocessor's threads that are resident",
    "matrix": "the matrix instruction that the machine code uses",
    "GFLOP": "work of all matrix products, in 10⁹ FLOPs",
    "MB": "what the programs read and write, in 10⁶ bytes",
    "bound": "the part of the GPU that bounds the time, and the time that it needs at its peak",
}
_TEXTS = ("ptx", "sass", "ttgir", "amdgcn")


@click.command()
@click.option(
    "--target",
    "target_name",
    type=click.Choice([*NAMED_TARGETS, *PRODUCTS]),
    default="sm_90",
    show_default=True,
    help="Which GPU.",
)
@problem_options("every")
@click.option(
    "--schedule", "schedule_text", help="A schedule, 'DATAFLOW KNOB=VALUE …'; otherwise the tuned one, or the default."
)
@click.option(
    "--matrix",
    cls=RestrictedOption,
    excludes=("--schedule", *SHAPE_NAMES, "--problem"),
    because="the matrix has its own shapes and schedules",
    is_flag=True,
    help="Inspect the default schedules over dtype x head dim x group x chunk size.",
)
@click.option("--ptx", is_flag=True, help="Write the PTX of each kernel.")
@click.option("--sass", is_flag=True, help="Write the machine code of each kernel (NVIDIA).")
@click.option("--ttgir", is_flag=True, help="Write Triton's GPU intermediate code of each kernel.")
@click.option("--amdgcn", is_flag=True, help="Write the machine code of each kernel (AMD).")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=".", help="Where files are written.")
@json_option
def inspect(target_name: str, schedule_text: str | None, matrix: bool, out: Path, as_json: bool, **flags: Any) -> None:
    """Compile kernels for a named GPU, without the GPU, and show registers, spills and what bounds them.

    Occupancy counts resident threads; FLOPs and bytes are counted from the shape, and the predicted time is the
    roofline's, a lower bound.

    \b
    Examples:
      hsa-compile inspect --target h100
      hsa-compile inspect --target gfx942 --op backward --head-dim 128
      hsa-compile inspect --op forward --schedule 'token num_warps=4 num_stages=2'
      hsa-compile inspect --target sm_100 --matrix
    """
    from hsa_compile.kernels.ahead_of_time import compile_launches
    from hsa_compile.kernels.compile import compile_kernel

    target = Target.parse(target_name)
    texts = [name for name in _TEXTS if flags[name]]
    problems = list(_matrix_problems(target, OP_NAMES[flags["op"]])) if matrix else asked_problems(target, flags)
    rows, bar = [], progress_bar(len(problems), "compile", hidden=not matrix)
    for problem in problems:
        schedule = Schedule.parse(schedule_text) if schedule_text else _schedule_of(problem, target)
        kernel = compile_kernel(emit_source(problem, schedule, target))
        for resources in compile_launches(kernel.module, target, sass="sass" in texts):
            rows.append(_row(problem, schedule, target, resources))
            _write_texts(resources, texts, out / f"{resources.name}_{target.arch}_{kernel.source.fingerprint}")
        bar.update()
    bar.close()
    print_rows(rows, as_json=as_json, legend=_LEGEND)


def _matrix_problems(target: Target, ops: Sequence[str]) -> Iterator[Problem]:
    points = itertools.product(_MATRIX_DTYPES, _MATRIX_HEAD_DIMS, _MATRIX_GROUPS, _MATRIX_CHUNKS)
    for dtype, head_dim, group, chunk_size in points:
        fields: dict[str, list[Any]] = {
            "dtype": [dtype],
            "head_dim": [head_dim],
            "num_heads": [2 * group],
            "chunk_size": [chunk_size],
        }
        yield from expand(target, fields, ops)


def _schedule_of(problem: Problem, target: Target) -> Schedule:
    found = default_cache().lookup(problem, target)
    return found.schedule if found else default_schedule(problem, target)


def _row(problem: Problem, schedule: Schedule, target: Target, resources: KernelResources) -> dict[str, Any]:
    work = count_work(problem, schedule)
    prediction = predict(problem, work, target)
    return {
        "kernel": resources.name.removeprefix("_"),
        "shape": f"{problem.dtype} G{problem.group} D{problem.head_dim} C{problem.chunk_size}",
        "schedule": str(schedule),
        "registers": resources.registers,
        "spills": resources.spills,
        "shared KB": round(resources.shared_memory / 1024, 1),
        "occupancy": f"{occupancy(resources, target):.0%}",
        "matrix": resources.matrix_instruction,
        "GFLOP": round(work.flops / 1e9, 1),
        "MB": round(work.cache_bytes / 1e6, 1),
        "bound": f"{prediction.bound}, {prediction.time_ms:.2g} ms",
    }


def _write_texts(resources: KernelResources, texts: Sequence[str], stem: Path) -> None:
    for name in texts:
        if name not in resources.asm:
            raise InvalidArgument(f"--{name} does not exist for this target; it has {', '.join(sorted(resources.asm))}")
        path = stem.with_name(f"{stem.name}.{name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(resources.asm[name])
        except OSError as error:
            raise CacheError(f"cannot write {path}: {error.strerror}") from error
        click.echo(f"wrote {path}", err=True)


@click.command()
@click.option(
    "--target",
    "target_name",
    default="auto",
    show_default=True,
    help="The device to emit for: auto, cpu, cuda:0, h100, sm_90, …",
)
@problem_options("forward")
@click.option(
    "--schedule", "schedule_text", help="A schedule, 'DATAFLOW KNOB=VALUE …'; otherwise the tuned one, or the default."
)
def emit(target_name: str, schedule_text: str | None, **flags: Any) -> None:
    """Print the kernels that would run, for this device or for one that is not there; equal ones once.

    \b
    Examples:
      hsa-compile emit
      hsa-compile emit --target sm_90 --op backward --head-dim 128
      hsa-compile emit --target gfx942 --schedule 'token num_warps=4 num_stages=2'
    """
    target = Target.parse(target_name)
    given = None if schedule_text is None else Schedule.parse(schedule_text)
    problems = asked_problems(target, flags)
    texts = [emit_source(problem, given or _schedule_of(problem, target), target).text for problem in problems]
    click.echo("".join(dict.fromkeys(texts)), nl=False)
