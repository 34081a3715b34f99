"""`hsa-compile emit`: print the source of the kernel that a problem and a schedule make."""

from typing import Any

import click

from hsa_compile.cli.options import SHAPE_FIELDS, expand, op_option, shape_options
from hsa_compile.errors import InvalidArgument
from hsa_compile.kernels.emit import emit as emit_source
from hsa_compile.schedules.cache import default_cache
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import default_schedule
from hsa_compile.target import Target


@click.command()
@click.option(
    "--target",
    "target_name",
    default="auto",
    show_default=True,
    help="The device to emit for: auto, cpu, cuda:0, sm_80, sm_90, …",
)
@op_option("forward")
@shape_options
@click.option(
    "--schedule", "schedule_text", help="A schedule, 'DATAFLOW KNOB=VALUE …'; otherwise the tuned one, or the default."
)
def emit(target_name: str, ops: tuple[str, ...], schedule_text: str | None, **shape: Any) -> None:
    """Print the kernel that would run, for this device or for one that is not there.

    \b
    Examples:
      hsa-compile emit
      hsa-compile emit --target sm_90 --op backward --head-dim 128
      hsa-compile emit --target gfx942 --schedule 'token num_warps=4 num_stages=2'
    """
    target = Target.parse(target_name)
    problems = expand(target, {name: shape[name] for name in SHAPE_FIELDS if shape[name]}, ops)
    if len(problems) > len(ops):
        raise InvalidArgument(f"{len(problems) // len(ops)} shapes are named; emit prints one")
    for problem in problems:
        found = default_cache().lookup(problem, target)
        if schedule_text is not None:
            schedule = Schedule.parse(schedule_text)
        else:
            schedule = found.schedule if found else default_schedule(problem, target)
        click.echo(emit_source(problem, schedule, target).text, nl=False)
