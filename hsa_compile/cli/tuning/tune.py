"""`hsa-compile tune`: search the schedules of one or several problems and store the winners."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hsa_compile.checks import one_line
from hsa_compile.cli.options import (
    GAIN,
    OP_NAMES,
    SHAPE_NAMES,
    RestrictedOption,
    counted,
    json_option,
    print_json,
    print_rows,
    problem_options,
    stop_on_ctrl_c,
)
from hsa_compile.cli.tuning.search_options import (
    SEARCH_NAMES,
    search_options,
    searched_problems,
    tune_options,
)
from hsa_compile.errors import InvalidArgument, InvalidTarget
from hsa_compile.problem import ALL_OPS, Problem
from hsa_compile.schedules.cache import default_cache
from hsa_compile.schedules.ops import source_version
from hsa_compile.schedules.record import MEASURED, TuningRecord
from hsa_compile.target import NAMED_TARGETS, PRODUCTS, Target

if TYPE_CHECKING:
    from hsa_compile.autotune.options import TuneOptions


# What a prediction, and a sweep of all candidates, do not ask about.
NOT_PREDICTED = tuple(name for name in SEARCH_NAMES if name != "--timeout")
NOT_SWEPT = ("--trials", "--timeout", "--sampler", "--until-within", "--storage", "--workers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one problem: its record, which was tuned just now or found, and whether Ctrl-C came meanwhile."""

    problem: Problem
    record: TuningRecord
    cached: bool
    stopped: bool


@click.command()
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Where to run: auto, cpu, cuda, cuda:1, or several GPUs at once: cuda:0,cuda:1.",
)
@problem_options("all")
@search_options
@click.option(
    "--target",
    "absent",
    cls=RestrictedOption,
    excludes=("--device", *NOT_PREDICTED, "--report-prediction", "--record", "--verify"),
    because="for a GPU that is not here, schedules are predicted within --timeout, and nothing is run",
    type=click.Choice([*NAMED_TARGETS, *PRODUCTS]),
    help="Predict for a GPU that is not here: candidates are compiled for it and ranked by a model.",
)
@click.option("--report-prediction", is_flag=True, help="Show how well that model orders what was timed on this GPU.")
@click.option(
    "--record",
    cls=RestrictedOption,
    excludes=("--verify", "--report-prediction", "--force", "--json", *NOT_SWEPT),
    because="every candidate is timed once, in one process, and only FILE is written",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Time every candidate instead and keep all times in FILE (.json or .json.gz); no schedule is stored.",
)
@click.option(
    "--verify",
    cls=RestrictedOption,
    excludes=("--op", *SHAPE_NAMES, *SEARCH_NAMES, "--preset", "--problem", "--report-prediction", "--force", "--json"),
    because="what is stored for the device is timed again as it is",
    is_flag=True,
    help="Time this device's stored winners against the default again, and drop the losers.",
)
@click.option("--force", is_flag=True, help="Tune anew what is cached or was begun, and time all of it again.")
@json_option
def tune(device: str, absent: str | None, report_prediction: bool, record: Path | None, verify: bool, force: bool,
         as_json: bool, **flags: Any) -> None:  # fmt: skip
    """Find the fastest schedule for a problem on this machine, and store it.

    Without flags it tunes what an attention layer of a default shape needs on the device that is found: attention
    forward and backward, and the selection of chunks, in about three minutes. A flag with several values makes several
    problems, and the table shows what each choice costs.

    Every trial is in the study's storage the moment it ends, so that the same command goes on with a search that was
    interrupted or killed. Ctrl-C stores the best so far. Several processes, GPUs and hosts that name the same
    --storage share the trials; optuna-dashboard opens that storage, too.

    \b
    Examples:
      hsa-compile tune
      hsa-compile tune --seq-len 16k --heads 16 --kv-heads 1 --head-dim 64
      hsa-compile tune --chunk-size 32,64,128 --top-k 8,16 --op forward
      hsa-compile tune --device cuda:0,cuda:1 --dtype bf16,fp16 --trials 100
      hsa-compile tune --preset tiny --seq-len 2k --batch 4
      hsa-compile tune --problem "select_chunks B1 T4096 … float32 R4"
      hsa-compile tune --storage postgresql://user@host/tuning   # on each host
      hsa-compile tune --target h100         # predicts, without the GPU
      hsa-compile tune --verify              # after an upgrade of PyTorch
    """
    import torch

    from hsa_compile.autotune.bench.device import check_memory
    from hsa_compile.autotune.cost.predict_schedule import check_predictable

    if absent:
        from hsa_compile.cli.tuning.predicted import tune_for_absent_target

        named = Target.parse(absent)
        problems = searched_problems(named, flags)
        tune_for_absent_target(problems, named, budget_s=flags["timeout"], force=force, as_json=as_json)
        return
    devices, target = _devices(device)
    if verify:
        _verify(target, devices[0])
        return
    if len(devices) > 1 and (record or flags["in_process"]):
        flag = "--record" if record else "--in-process"
        raise InvalidArgument(f"{flag} uses one device, --device names {len(devices)}: {device}")
    if report_prediction:
        check_predictable(target)
    options = replace(tune_options(flags), storage=flags["storage"], anew=force)
    problems = searched_problems(target, flags)
    for problem in problems:  # all are checked first, so that the last does not end the run
        check_memory(problem, torch.device(devices[0]))
    click.echo(f"device    {target.name} ({target.kind} {target.arch}, {counted(target.num_cores, 'core')})", err=True)
    if record:
        from hsa_compile.cli.tuning.record import record_sweeps

        record_sweeps(problems, target, devices, options, record)
        return
    outcomes = []
    for problem in problems:
        outcomes.append(_outcome(problem, target, devices, options))
        click.echo(_verdict(outcomes[-1]), err=True)
        if outcomes[-1].stopped:
            raise KeyboardInterrupt
    if report_prediction:
        from hsa_compile.cli.tuning.predicted import report_predictions

        report_predictions(problems, target, options.distribution)
    if as_json:
        print_json([_values(outcome) for outcome in outcomes])
        return
    _print_outcomes(outcomes, len(outcomes) if flags["problem"] or flags["preset"] else len(OP_NAMES[flags["op"]]))
    if any(outcome.record.shortfall is None for outcome in outcomes):
        click.echo(f"\nstored in {default_cache().path(target)}")


def _verify(target: Target, device: str) -> None:
    """Times what the user's cache has for a device once more: winners stay with today's times, losers go.

    What cannot be timed at the moment stays as it is.
    """
    from hsa_compile.autotune.bench.bench import FAILURES
    from hsa_compile.autotune.play_off import verify

    cache = default_cache()
    stored = [
        record
        for origin, record in cache.entries()
        if (origin, record.kind) == ("user", MEASURED) and record.target == target
        and record.kernel_source == source_version(record.problem, target)
    ]  # fmt: skip
    num_timed = 0
    for record in stored:
        try:
            found = verify(record, device)
        except FAILURES as error:
            click.echo(f"{record.problem.describe()}: kept as it is, {one_line(error)}")
            continue
        num_timed += 1
        if isinstance(found, str):
            cache.remove(record)
            click.echo(f"{record.problem.describe()}: dropped, {found}: {record.schedule}")
        else:
            cache.put(found)
            click.echo(
                f"{record.problem.describe()}: kept, {found.speedup:.2f}x the default ({record.speedup:.2f}x then)"
            )
    click.echo(f"{counted(num_timed, 'stored winner')} timed again in {cache.path(target)}")


def _devices(text: str) -> tuple[list[str], Target]:
    """Returns the devices to run on, by the names that PyTorch has for them, and what the first of them is."""
    names = text.split(",")
    for name in names:
        if name in (*NAMED_TARGETS, *PRODUCTS):
            raise InvalidTarget(
                f"device {name!r} is no device to run on (see --target); allowed are auto, cpu, cuda, cuda:N"
            )
    targets = [Target.parse(name) for name in names]
    places = [
        name if ":" in name or name == "cpu" else "cpu" if target.kind == "cpu" else "cuda:0"
        for name, target in zip(names, targets, strict=True)
    ]
    return places, targets[0]


def _outcome(problem: Problem, target: Target, devices: Sequence[str], options: TuneOptions) -> Outcome:
    from hsa_compile.autotune.tune import search_bar, tune_missing

    with stop_on_ctrl_c() as stopped, search_bar(problem, options) as show:
        record, cached = tune_missing(
            problem, target, options, device=devices, on_progress=show, should_stop=stopped.is_set
        )
    return Outcome(problem=problem, record=record, cached=cached, stopped=stopped.is_set())


def _verdict(outcome: Outcome) -> str:
    record = outcome.record
    how = "cached (--force tunes again)" if outcome.cached else _how(outcome)
    if record.problem != outcome.problem:
        how += f", tuned as {record.problem.describe()}"
    return f"{outcome.problem.describe()}: {_found(record)} [{how}]"


def _found(record: TuningRecord) -> str:
    """Says what the search gained, or that there was nothing to gain."""
    is_all = record.tried_all and not record.failures
    tried = f"all {record.timed} there are" if is_all else f"{record.timed} timed"
    time = f"{record.measurement.median_ms:.3g} ms{_by_inputs(record)}"
    if not record.is_default:
        return f"{time}, {record.speedup:.2f}x faster than the default, the best of {tried}: {record.schedule}"
    if record.trials == 1:
        return f"{time}, the default, and nothing else was tried: {record.schedule}"
    return f"{time}, the default is already within noise of the best of {tried}: {record.schedule}"


def _by_inputs(record: TuningRecord) -> str:
    """Says what the winner takes on each of several distributions."""
    each = ", ".join(f"{own.median_ms:.3g} on {name}" for name, (own, _) in record.by_inputs.items())
    return f" ({each})" if each else ""


def _how(outcome: Outcome) -> str:
    """Says why nothing is stored, or what the play-off found; and counts the trials that failed, by kind."""
    record = outcome.record
    if record.shortfall:
        how = f"nothing is stored: {record.shortfall}; with more --trials or --timeout the same command goes on"
    elif record.complete:
        how = record.verdict
    else:
        how = "interrupted" if outcome.stopped else f"{record.verdict}; the same command tries again what failed"
    failed = ", ".join(f"{count} {name}" for name, count in sorted(record.failures.items()))
    return f"{how}; failed: {failed}" if failed else how


def _values(outcome: Outcome) -> dict[str, Any]:
    """Returns the record, ready for JSON, with what became of it."""
    record = outcome.record
    stored = record.shortfall is None
    return {**record.to_dict(), "speedup": record.speedup, "cached": outcome.cached, "stored": stored}


_TIME = "the median time of the winner"
_LEGEND = {
    "problem": "the op, and its shape in the letters of docs/hsa.md",
    "shape": "the shape in the letters of docs/hsa.md",
    "time": _TIME,
    "gain": GAIN,
    "sum": "the times of the ops together",
    "cost": "the sum over the least sum of this table: what the choice of a shape costs",
}


def _print_outcomes(outcomes: list[Outcome], ops_a_shape: int) -> None:
    """Prints a row a shape if there are several, which can be compared, and otherwise a row a problem."""
    in_rows = len(outcomes) == ops_a_shape
    rows = list(_problem_rows(outcomes) if in_rows else _shape_rows(outcomes, ops_a_shape))
    click.echo()
    print_rows(rows, as_json=False, legend=dict.fromkeys(ALL_OPS, f"{_TIME}, and {GAIN}") | _LEGEND)


def _problem_rows(outcomes: list[Outcome]) -> Iterator[dict[str, str]]:
    """Yields one row a problem, since the ops of a model have shapes of their own."""
    for outcome in outcomes:
        record = outcome.record
        yield {
            "problem": outcome.problem.describe(),
            "time": f"{record.measurement.median_ms:.3g} ms",
            "gain": f"{record.speedup:.2f}x",
        }


def _shape_rows(outcomes: list[Outcome], ops_a_shape: int) -> Iterator[dict[str, str]]:
    """Yields one row a shape: each op's time and gain, their sum, and the sum over the cheapest shape's."""
    shapes = [outcomes[i : i + ops_a_shape] for i in range(0, len(outcomes), ops_a_shape)]
    totals = [sum(outcome.record.measurement.median_ms for outcome in shape) for shape in shapes]
    for shape, total in zip(shapes, totals, strict=True):
        problem = shape[0].problem
        row = {"shape": problem.describe().removeprefix(f"{problem.op} ")}
        for outcome in shape:
            record = outcome.record
            row[outcome.problem.op] = f"{record.measurement.median_ms:.3g} ms {record.speedup:.2f}x"
        row["sum"] = f"{total:.3g} ms"
        row["cost"] = f"{total / min(totals):.2f}"
        yield row
