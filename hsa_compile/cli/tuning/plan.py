"""`hsa-compile plan`: what `tune` would do, before it does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from hsa_compile.cli.options import json_option, print_rows, problem_options
from hsa_compile.cli.tuning.search_options import search_options, searched_problems, tune_options
from hsa_compile.problem import Problem
from hsa_compile.schedules.cache import default_cache
from hsa_compile.schedules.record import MIN_TIMED
from hsa_compile.schedules.space import SearchSpace, default_schedule
from hsa_compile.target import Target

if TYPE_CHECKING:
    from hsa_compile.autotune.evaluate import Outcome
    from hsa_compile.autotune.options import TuneOptions
    from hsa_compile.autotune.study.ledger import Ledger

_LEGEND = {
    "problem": "the op, and its shape in the letters of docs/hsa.md",
    "candidates": "how many schedules there are",
    "trials": "how many of the others would be tried at most",
    "timed before": "how many outcomes the ledger knows, which cost nothing again",
    "minutes": "how long that would take, by what candidates took before; at most the timeout",
    "cached": "whether a finished search is stored, so that nothing would be done",
}
_START_S, _TRIAL_S = 4.0, 2.0  # seconds that a search takes to start, and a candidate where none was timed yet


@click.command()
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="The device to plan for: auto, cpu, cuda, cuda:1, h100, sm_90, …",
)
@problem_options("all")
@search_options
@click.option("--force", is_flag=True, help="Plan as if nothing were cached.")
@json_option
def plan(device: str, force: bool, as_json: bool, **flags: Any) -> None:
    """Show what `tune` with the same flags would do: problems, candidates, minutes, and what is cached.

    Minutes are estimated from what candidates took on this device before, and are at most the timeout.

    \b
    Examples:
      hsa-compile plan --seq-len 4k,16k --top-k 8,16
      hsa-compile plan --preset tiny --trials 200 --timeout 600
    """
    from hsa_compile.autotune.study.ledger import Ledger, default_ledger

    options = replace(tune_options(flags), anew=force)
    target = Target.parse(device.split(",")[0])
    ledger = Ledger(default_ledger(target))
    past = [(key["problem"], outcome) for key, outcome in ledger.lines()]
    rows = [_row(problem, target, options, ledger, past) for problem in searched_problems(target, flags)]
    print_rows(rows, as_json=as_json, legend=_LEGEND)
    if not as_json:
        click.echo(f"\nabout {sum(row['minutes'] for row in rows):.1f} minutes")
        if any(0 < row["trials"] < min(MIN_TIMED, row["candidates"]) for row in rows):
            click.echo(f"nothing is stored: --trials {options.trials} is too few, {MIN_TIMED} are needed")


def _row(
    problem: Problem,
    target: Target,
    options: TuneOptions,
    ledger: Ledger,
    past: Sequence[tuple[dict[str, Any], Outcome]],
) -> dict[str, Any]:
    from hsa_compile.autotune.options import default_inputs, inputs_label
    from hsa_compile.autotune.study.ledger import ProblemLedger

    valid = sum(1 for _ in SearchSpace.of(problem, target).schedules())
    found = default_cache().finished(problem, target)
    cached = found is not None and options.takes(found.inputs)
    own = [outcome.seconds for fields, outcome in past if fields == problem.to_dict()]
    same_op = [outcome.seconds for fields, outcome in past if fields["op"] == problem.op]
    seconds = own or same_op
    known = 0
    if valid and not options.anew:
        label = inputs_label(options.distribution or default_inputs(target.kind))
        known = len(ProblemLedger(ledger, problem, target, label, default_schedule(problem, target)).known())
    trials = 0 if cached else min(valid - known, options.trials)
    estimate = _START_S + trials * (sum(seconds) / len(seconds) if seconds else _TRIAL_S)
    return {
        "problem": problem.describe(),
        "candidates": valid,
        "trials": trials,
        "timed before": known,
        "minutes": 0.0 if cached else round(min(options.timeout, estimate) / 60, 2),
        "cached": "yes" if cached else "no",
    }
