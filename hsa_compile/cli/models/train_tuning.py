"""`hsa-compile train --tune`: schedules for the shapes of a run, before it begins."""

import click
import torch

from hsa_compile.autotune.options import TuneOptions
from hsa_compile.autotune.tune import tune_missing
from hsa_compile.model.training.config import RunConfig
from hsa_compile.model.training.processes import Processes
from hsa_compile.model.training.run import run_problems
from hsa_compile.schedules.cache import default_cache
from hsa_compile.target import Target

SECONDS_A_PROBLEM = 15.0


def tune_for_run(run: RunConfig, processes: Processes) -> None:
    """Tunes what the cache has no measured schedule for and says what it did; the other processes wait."""
    if processes.is_first:
        wanted = run_problems(run, processes.device, processes.world_size)
        target = Target.of(processes.device)
        missing = [problem for problem in wanted if default_cache().finished(problem, target) is None]
        click.echo(
            f"{len(wanted)} problems, {len(wanted) - len(missing)} tuned before, {len(missing)} to tune, at most "
            f"{SECONDS_A_PROBLEM:.0f} s each",
            err=True,
        )
        for problem in missing:
            options = TuneOptions(timeout=SECONDS_A_PROBLEM)
            record, _ = tune_missing(problem, target, options, device=_name(processes.device))
            kept = f"; nothing is stored: {record.shortfall}" if record.shortfall else ""
            took = f"{record.measurement.median_ms:.3g} ms, {record.speedup:.2f}x the default"
            click.echo(f"{problem.describe()}: {took}{kept}", err=True)
    processes.wait()


def _name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else str(device)
