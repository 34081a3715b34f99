"""`hsa-compile schedules explain`: which entry a problem would use, and why not a better one."""

from collections.abc import Iterator
from typing import Any

import click

from hsa_compile.cli.options import SHAPE_FIELDS, expand, json_option, op_option, print_json, shape_options
from hsa_compile.schedules.cache import default_cache
from hsa_compile.schedules.explain import Difference, Explanation, Rival
from hsa_compile.schedules.explain import explain as explain_problem
from hsa_compile.target import Target

_MAX_RIVALS = 5


@click.command(short_help="Show which schedule a problem would run on, and why.")
@click.option("--device", default="auto", show_default=True, help="The device: auto, cpu, cuda:0, sm_90, …")
@op_option("all")
@shape_options
@click.option("--all", "show_all", is_flag=True, help=f"Show all entries, not only the nearest {_MAX_RIVALS}.")
@json_option
def explain(device: str, ops: tuple[str, ...], show_all: bool, as_json: bool, **shape: Any) -> None:
    """Show which schedule a problem would run on, what that is expected to lose, and why no other entry serves.

    \b
    Examples:
      hsa-compile schedules explain
      hsa-compile schedules explain --seq-len 32k --top-k 16 --op forward
      hsa-compile schedules explain --device sm_90 --head-dim 128 --all
    """
    target = Target.parse(device)
    problems = expand(target, {name: shape[name] for name in SHAPE_FIELDS if shape[name]}, ops)
    explanations = [explain_problem(default_cache(), problem, target) for problem in problems]
    if as_json:
        print_json([_values(explanation) for explanation in explanations])
        return
    for number, explanation in enumerate(explanations):
        click.echo("\n" * (number > 0) + "\n".join(_lines(explanation, show_all)))


def _lines(explanation: Explanation, show_all: bool) -> Iterator[str]:
    yield f"{explanation.problem.describe()} on {explanation.target.name}"
    yield f"  runs      {explanation.schedule}"
    yield f"  from      {_source(explanation)}"
    for difference in explanation.differences:
        yield f"            {difference}"
    yield f"  expected to lose  {explanation.loss}"
    shown = explanation.rivals if show_all else explanation.rivals[:_MAX_RIVALS]
    for rival in shown:
        record = rival.candidate.record
        entry = f"{rival.candidate.origin}, {record.kind}: {record.problem.describe()} on {record.target.name}"
        yield f"  not from  {entry}"
        yield f"            {_reason(rival)}"
    if len(shown) < len(explanation.rivals):
        yield f"  and {len(explanation.rivals) - len(shown)} more (--all)"


def _source(explanation: Explanation) -> str:
    if explanation.found is None:
        return "the default for this kind of device; no entry can serve"
    record = explanation.found.record
    how = "exact" if explanation.how == "exact" else f"nearest, distance {explanation.found.distance:.2f}"
    entry = f"{record.problem.describe()} on {record.target.name}"
    return f"{explanation.found.origin}, {record.kind} {record.date[:10]}, {how}: {entry}"


def _reason(rival: Rival) -> str:
    if rival.candidate.mismatches:
        return "; ".join(str(difference) for difference in rival.differences if difference.distance is None)
    return rival.why


def _values(explanation: Explanation) -> dict[str, Any]:
    found = explanation.found
    return {
        "problem": explanation.problem.to_dict(),
        "target": explanation.target.to_dict(),
        "schedule": dict(explanation.schedule),
        "how": explanation.how,
        "origin": found.origin if found else "default",
        "kind": found.record.kind if found else None,
        "distance": found.distance if found else None,
        "regret": found.regret if found else None,
        "loss": explanation.loss,
        "differences": _difference_values(explanation.differences),
        "others": [
            {
                "origin": rival.candidate.origin,
                "kind": rival.candidate.record.kind,
                "problem": rival.candidate.record.problem.describe(),
                "device": rival.candidate.record.target.name,
                "why_not": rival.why,
                "differences": _difference_values(rival.differences),
            }
            for rival in explanation.rivals
        ],
    }


def _difference_values(differences: tuple[Difference, ...]) -> dict[str, dict[str, Any]]:
    return {d.field: {"asked": d.asked, "entry": d.entry, "distance": d.distance} for d in differences}
