"""`hsa-compile tune`: search the schedules of one or several problems and store the winners."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import click
import torch
import tqdm

from hsa_compile.autotune.inputs import DISTRIBUTIONS
from hsa_compile.autotune.memory import check_memory
from hsa_compile.autotune.problems import expand
from hsa_compile.autotune.tune import DEFAULT_TIMEOUT_S, DEFAULT_TRIALS, MAX_SEED, Progress, check_limits
from hsa_compile.autotune.tune import tune as tune_problem
from hsa_compile.cli.options import SHAPE_FIELDS, json_option, op_option, print_json, print_rows, shape_options
from hsa_compile.errors import InvalidTarget
from hsa_compile.problem import Problem
from hsa_compile.schedules.cache import default_cache
from hsa_compile.schedules.record import TuningRecord
from hsa_compile.target import NAMED_TARGETS, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one problem: its record, tuned just now or found."""

    problem: Problem
    record: TuningRecord
    cached: bool


@click.command()
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, …")
@op_option("all")
@shape_options
@click.option("--inputs", type=click.Choice(DISTRIBUTIONS), default="random", show_default=True, help="How picks fall.")
@click.option("--trials", type=click.IntRange(min=1), default=DEFAULT_TRIALS, show_default=True, help="A problem.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=DEFAULT_TIMEOUT_S,
    show_default=True,
    help="Seconds for each problem and op.",
)
@click.option("--seed", type=click.IntRange(0, MAX_SEED), default=0, show_default=True, help="Of sampler and inputs.")
@click.option("--force", is_flag=True, help="Tune again what is cached.")
@json_option
def tune(device: str, ops: tuple[str, ...], inputs: str, trials: int, timeout: float, seed: int, force: bool,
         as_json: bool, **shape: Any) -> None:  # fmt: skip
    """Find the fastest schedule for a problem on this machine, and store it.

    Without flags: a default problem for the device that is found, forward and backward, in about two minutes.
    A flag with several values makes several problems, and the table shows what each choice costs.

    \b
    Examples:
      hsa-compile tune
      hsa-compile tune --seq-len 16k --heads 16 --kv-heads 1 --head-dim 64
      hsa-compile tune --chunk-size 32,64,128 --top-k 8,16 --op forward
      hsa-compile tune --device cuda:0 --dtype bf16,fp16 --trials 100 --timeout 300
    """
    check_limits(trials, timeout, seed)
    if device in NAMED_TARGETS:
        raise InvalidTarget(
            f"device {device!r} is an architecture, not a device to run on; allowed are auto, cpu, cuda, cuda:N"
        )
    target = Target.parse(device)
    problems = expand(target, {name: shape[name] for name in SHAPE_FIELDS if shape[name]}, ops)
    for problem in problems:  # before the first is tuned, so that the last does not end the run
        check_memory(problem, torch.device(_place(device, target)))
    click.echo(f"device    {target.name} ({target.kind} {target.arch}, {target.num_cores} cores)", err=True)
    cache = default_cache()
    outcomes = []
    for problem in problems:
        record = None if force else cache.exact(problem, target)
        cached = record is not None
        if record is None:
            record = _tune_with_bar(problem, target, device, inputs, trials, timeout, seed)
            cache.put(record)
        outcomes.append(Outcome(problem=problem, record=record, cached=cached))
        click.echo(_verdict(outcomes[-1]), err=True)
    if as_json:
        print_json([{**o.record.to_dict(), "speedup": o.record.speedup, "cached": o.cached} for o in outcomes])
        return
    click.echo()
    print_rows(list(_shape_rows(outcomes, len(ops))), as_json=False)
    click.echo(f"\nstored in {cache.path(target)}")


def _tune_with_bar(
    problem: Problem, target: Target, device: str, inputs: str, trials: int, timeout: float, seed: int
) -> TuningRecord:
    with tqdm.tqdm(
        total=trials, desc=f"{problem.op:12}", unit="trial", bar_format="{desc} {bar:20} {n_fmt}/{total_fmt}{postfix}"
    ) as bar:

        def show(progress: Progress) -> None:
            left = _seconds_left(progress)
            bar.set_postfix_str(
                f"best {progress.best_ms:.3g} ms (default {progress.default_ms:.3g}), {left:.0f} s left", refresh=False
            )
            bar.update(progress.tried - bar.n)

        return tune_problem(
            problem,
            target,
            device=_place(device, target),
            trials=trials,
            timeout=timeout,
            seed=seed,
            distribution=inputs,
            on_progress=show,
        )


def _place(device: str, target: Target) -> str:
    """The device to run on, by the name PyTorch has for it."""
    return device if ":" in device or device == "cpu" else "cpu" if target.kind == "cpu" else "cuda:0"


def _seconds_left(progress: Progress) -> float:
    """Until the trials run out at the pace so far, or the time does."""
    by_trials = progress.elapsed_s / progress.tried * (progress.max_trials - progress.tried)
    return max(0.0, min(by_trials, progress.timeout_s - progress.elapsed_s))


def _verdict(outcome: Outcome) -> str:
    record = outcome.record
    found = f"{record.measurement.median_ms:.3g} ms, {record.speedup:.2f}x the default: {record.schedule}"
    how = "cached (--force tunes again)" if outcome.cached else f"{record.trials} trials"
    if record.problem != outcome.problem:
        how += f", tuned as {record.problem.describe()}"
    return f"{outcome.problem.describe()}: {found} [{how}]"


def _shape_rows(outcomes: list[Outcome], ops_a_shape: int) -> Iterator[dict[str, str]]:
    """One row a shape: each op's time and gain, their sum, and the sum over the cheapest shape's."""
    shapes = [outcomes[i : i + ops_a_shape] for i in range(0, len(outcomes), ops_a_shape)]
    totals = [sum(outcome.record.measurement.median_ms for outcome in shape) for shape in shapes]
    for shape, total in zip(shapes, totals, strict=True):
        problem = shape[0].problem
        row = {"shape": problem.describe().removeprefix(f"{problem.op} ")}
        for outcome in shape:
            op = outcome.problem.op.removeprefix("hsa_")
            row[op] = f"{outcome.record.measurement.median_ms:.3g} ms"
            row[f"{op} gain"] = f"{outcome.record.speedup:.2f}x"
        row["sum"] = f"{total:.3g} ms"
        row["cost"] = f"{total / min(totals):.2f}"
        yield row
