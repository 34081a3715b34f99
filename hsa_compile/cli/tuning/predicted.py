"""`hsa-compile tune --target`: schedules for a GPU that is not there; how good such predictions are on one that is."""

from collections.abc import Sequence

import click

from hsa_compile.autotune.cost.predict_schedule import (
    MIN_SCHEDULES,
    PredictionProgress,
    check_predictable,
    predict_schedule,
    prediction_correlation,
)
from hsa_compile.autotune.options import default_inputs, inputs_label
from hsa_compile.autotune.study.ledger import Ledger, ProblemLedger, default_ledger
from hsa_compile.cli.options import GAIN, print_json, print_rows
from hsa_compile.log import progress_bar
from hsa_compile.problem import Problem
from hsa_compile.schedules.cache import default_cache
from hsa_compile.schedules.record import MEASURED, PREDICTED, TuningRecord
from hsa_compile.schedules.space import default_schedule
from hsa_compile.target import Target

_LEGEND = {
    "problem": "the op, and its shape in the letters of docs/hsa.md",
    "schedule": "the schedule that the model likes best",
    "kind": "predicted, or measured where such a device was there before",
    "time": "what the model expects, which is good for ranking; or the median that was measured",
    "gain": GAIN,
    "how": "how many candidates were compiled, and how many of them are out, by the error; or that it was stored",
}


def tune_for_absent_target(
    problems: Sequence[Problem], target: Target, *, budget_s: float, force: bool = False, as_json: bool = False
) -> None:
    """Predicts, stores and prints a schedule for each problem; what is stored already is kept unless forced.

    Raises:
        the errors of `predict_schedule`.
    """
    check_predictable(target)
    click.echo(f"target    {target.name} ({target.kind} {target.arch}): compiled here, ranked by a model", err=True)
    cache = default_cache()
    rows, records = [], []
    for problem in problems:
        record = None if force else _stored(problem, target)
        how = "cached (--force predicts again)" if record else ""
        if record is None:
            record = _predict_with_bar(problem, target, budget_s)
            cache.put(record)
            how = f"{record.trials} compiled" + _failures(record)
        records.append(record)
        rows.append(
            {
                "problem": problem.describe(),
                "schedule": str(record.schedule),
                "kind": record.kind,
                "time": f"{record.measurement.median_ms:.3g} ms",
                "gain": f"{record.speedup:.2f}x",
                "how": how,
            }
        )
    if as_json:
        print_json([{**record.to_dict(), "speedup": record.speedup} for record in records])
        return
    print_rows(rows, as_json=False, legend=_LEGEND)
    click.echo(f"\nstored in {cache.path(target)}; times are a model's until the device is there: hsa-compile tune")


def report_predictions(problems: Sequence[Problem], target: Target, inputs: str | None) -> None:
    """Prints how the model orders the schedules that were timed on the device at hand, a line for each problem.

    Args:
        inputs: what they were timed on (`TuneOptions.distribution`).

    Raises:
        InvalidTarget: there is no model for the target; there is none for CPUs.
    """
    check_predictable(target)
    ledger, label = Ledger(default_ledger(target)), inputs_label(inputs or default_inputs(target.kind))
    for problem in problems:
        known = ProblemLedger(ledger, problem, target, label, default_schedule(problem, target)).known()
        ratios = {schedule: outcome.ratio for schedule, outcome in known.items() if outcome.ratio is not None}
        text = f"{len(ratios)} schedules were timed, too few to compare"
        if len(ratios) >= MIN_SCHEDULES:
            correlation = prediction_correlation(problem, target, ratios)
            text = f"rank correlation {correlation:.2f} of predicted with measured times, {len(ratios)} schedules"
        click.echo(f"{problem.describe()}: {text}", err=True)


def _stored(problem: Problem, target: Target) -> TuningRecord | None:
    cache = default_cache()
    return cache.exact(problem, target, MEASURED) or cache.exact(problem, target, PREDICTED)


def _predict_with_bar(problem: Problem, target: Target, budget_s: float) -> TuningRecord:
    text = "{desc} {bar} {n_fmt}/{total_fmt} s{postfix}"
    with progress_bar(round(budget_s), f"{problem.op:12}", bar_format=text) as bar:

        def show(progress: PredictionProgress) -> None:
            best = f"best {progress.best_ms:.3g} ms" if progress.best_ms else "none without spills"
            bar.set_postfix_str(f"{progress.compiled} compiled, {best}", refresh=False)
            bar.update(min(round(progress.elapsed_s), bar.total) - bar.n)

        return predict_schedule(problem, target, budget_s=budget_s, on_progress=show)


def _failures(record: TuningRecord) -> str:
    return "".join(f", {count} out: {name}" for name, count in record.failures.items())
