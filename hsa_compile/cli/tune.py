"""`hsa-compile tune`: search the schedules of one or several problems and store the winners."""

from collections.abc import Iterator
from typing import Any

import click
import tqdm

from hsa_compile.autotune.inputs import DISTRIBUTIONS
from hsa_compile.autotune.problems import expand
from hsa_compile.autotune.tune import DEFAULT_TIMEOUT_S, DEFAULT_TRIALS, MAX_SEED, Progress, check_limits
from hsa_compile.autotune.tune import tune as tune_problem
from hsa_compile.cli.options import SHAPE_FIELDS, json_option, op_option, print_json, print_rows, shape_options
from hsa_compile.errors import InvalidTarget
from hsa_compile.problem import Problem
from hsa_compile.schedules.cache import ScheduleCache, default_cache
from hsa_compile.schedules.record import TuningRecord
from hsa_compile.target import NAMED_TARGETS, Target


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
    click.echo(f"device    {target.name} ({target.kind} {target.arch}, {target.num_cores} cores)", err=True)
    cache = default_cache()
    results = []
    for problem in problems:
        record = None if force else cache.exact(problem, target)
        cached = record is not None
        if record is None:
            record = _tune_with_bar(problem, target, device, inputs, trials, timeout, seed)
            cache.put(record)
        click.echo(_verdict(record, cached), err=True)
        results.append((record, cached))
    _print_results(results, ops, cache, target, as_json)


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

        place = "cuda:0" if device in ("auto", "cuda") and target.kind != "cpu" else device
        return tune_problem(
            problem,
            target,
            device="cpu" if target.kind == "cpu" else place,
            trials=trials,
            timeout=timeout,
            seed=seed,
            distribution=inputs,
            on_progress=show,
        )


def _seconds_left(progress: Progress) -> float:
    """Until the trials run out at the pace so far, or the time does."""
    by_trials = progress.elapsed_s / progress.tried * (progress.max_trials - progress.tried)
    return max(0.0, min(by_trials, progress.timeout_s - progress.elapsed_s))


def _verdict(record: TuningRecord, cached: bool) -> str:
    found = f"{record.measurement.median_ms:.3g} ms, {record.speedup:.2f}x the default: {record.schedule}"
    how = "cached (--force tunes again)" if cached else f"{record.trials} trials"
    return f"{record.problem.describe()}: {found} [{how}]"


def _print_results(
    results: list[tuple[TuningRecord, bool]], ops: tuple[str, ...], cache: ScheduleCache, target: Target, as_json: bool
) -> None:
    if as_json:
        print_json([{**record.to_dict(), "speedup": record.speedup, "cached": cached} for record, cached in results])
        return
    click.echo()
    print_rows(list(_shape_rows([record for record, _ in results], len(ops))), as_json=False)
    click.echo(f"\nstored in {cache.path(target)}")


def _shape_rows(records: list[TuningRecord], ops_a_shape: int) -> Iterator[dict[str, str]]:
    """One row a shape: each op's time and gain, their sum, and the sum over the cheapest shape's."""
    shapes = [records[i : i + ops_a_shape] for i in range(0, len(records), ops_a_shape)]
    totals = [sum(record.measurement.median_ms for record in shape) for shape in shapes]
    for shape, total in zip(shapes, totals, strict=True):
        problem = shape[0].problem
        row = {
            "shape": problem.describe().removeprefix(f"{problem.op} "),
        }
        for record in shape:
            row[record.problem.op.removeprefix("hsa_")] = f"{record.measurement.median_ms:.3g} ms"
            row[f"{record.problem.op.removeprefix('hsa_')} gain"] = f"{record.speedup:.2f}x"
        row["sum"] = f"{total:.3g} ms"
        row["cost"] = f"{total / min(totals):.2f}"
        yield row
