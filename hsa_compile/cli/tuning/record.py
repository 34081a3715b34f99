"""`hsa-compile tune --record`: whole spaces, timed and kept in files that searches can be replayed on."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from hsa_compile.autotune.evaluate import Outcome
from hsa_compile.autotune.options import TuneOptions
from hsa_compile.autotune.session import Session
from hsa_compile.autotune.study.ledger import default_ledger
from hsa_compile.autotune.sweeps import RecordedSweep, sweep
from hsa_compile.cli.options import stop_on_ctrl_c
from hsa_compile.errors import CacheError
from hsa_compile.log import progress_bar
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import default_schedule
from hsa_compile.target import Target


def record_sweeps(
    problems: Sequence[Problem], target: Target, devices: Sequence[str], options: TuneOptions, path: Path
) -> None:
    """Sweeps each problem and writes its file: `FILE` itself for one, `STEM-OP-NUMBER.SUFFIX` for several.

    What was timed is in the ledger, so that a sweep that was stopped goes on.

    Raises:
        KeyboardInterrupt: a sweep was stopped before it was whole; nothing is written.
        CacheError: a file cannot be written.
    """
    options = replace(options, storage=None, ledger=default_ledger(target), workers=1)
    for number, problem in enumerate(problems, start=1):
        outcomes = _sweep(problem, target, devices, options)
        default_ms = outcomes[default_schedule(problem, target)].median_ms
        assert default_ms is not None  # a sweep ends where the default fails
        results = {schedule: _result(outcome, default_ms) for schedule, outcome in outcomes.items()}
        file = path if len(problems) == 1 else _numbered(path, f"{problem.op}-{number}")
        try:
            RecordedSweep.of_schedules(results, problem=problem, target=target).save(file)
        except OSError as error:
            raise CacheError(f"cannot write {file}: {error.strerror}") from error
        click.echo(f"{problem.describe()}: {len(results)} candidates in {file}")


def _sweep(problem: Problem, target: Target, devices: Sequence[str], options: TuneOptions) -> dict[Schedule, Outcome]:
    with (
        stop_on_ctrl_c() as stopped,
        Session(problem, target, devices[:1], options) as session,
        progress_bar(None, f"{problem.op:12}", unit="candidate") as bar,
    ):

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        assert session.ledger is not None
        outcomes = sweep(
            problem,
            target,
            session.first[0],
            session.main_bench,
            session.ledger,
            inputs=session.inputs,
            should_stop=stopped.is_set,
            on_outcome=show,
        )
        if stopped.is_set():
            raise KeyboardInterrupt
    return outcomes


def _result(outcome: Outcome, default_ms: float) -> float | str:
    """Returns a time relative to the default's, which drift does not touch, or why there is none."""
    return f"{outcome.failure}: {outcome.reason}" if outcome.ratio is None else outcome.ratio * default_ms


def _numbered(path: Path, name: str) -> Path:
    suffix = "".join(path.suffixes)
    return path.with_name(f"{path.name.removesuffix(suffix)}-{name}{suffix}")
