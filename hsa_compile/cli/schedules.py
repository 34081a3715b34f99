"""`hsa-compile schedules`: look at what was tuned, move it to another machine, or remove it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from hsa_compile.cli.options import (
    GAIN,
    asked_problems,
    json_option,
    print_json,
    print_rows,
    problem_options,
)
from hsa_compile.cli.schedule_diff import diff, entry_number
from hsa_compile.errors import InvalidArgument
from hsa_compile.schedules.cache import default_cache
from hsa_compile.schedules.exchange import export_records, import_records
from hsa_compile.schedules.explain import Difference, Explanation, Rival
from hsa_compile.schedules.explain import explain as explain_problem
from hsa_compile.schedules.ops import source_version
from hsa_compile.schedules.record import PREDICTED, TuningRecord
from hsa_compile.target import Target
from hsa_compile.versions import installed_versions


def entry_values(number: int, origin: str, record: TuningRecord) -> dict[str, Any]:
    """Returns everything about an entry, ready for JSON."""
    return {"number": number, "origin": origin, "speedup": record.speedup, **record.to_dict()}


_MAX_RIVALS = 5


@click.command(short_help="Show which schedule a problem would run on, and why.")
@click.option("--device", default="auto", show_default=True, help="The device: auto, cpu, cuda:0, h100, sm_90, …")
@problem_options("all")
@click.option("--all", "show_all", is_flag=True, help=f"Show all entries, not only the nearest {_MAX_RIVALS}.")
@json_option
def explain(device: str, show_all: bool, as_json: bool, **flags: Any) -> None:
    """Show which schedule a problem would run on, what that is expected to lose, and why no other entry serves.

    \b
    Examples:
      hsa-compile schedules explain
      hsa-compile schedules explain --seq-len 32k --top-k 16 --op forward
      hsa-compile schedules explain --device sm_90 --head-dim 128 --all
    """
    target = Target.parse(device)
    problems = asked_problems(target, flags)
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
    return f"{explanation.found.origin}, {record.kind} {record.date[:10]}, {how}: {entry}{_timed_on(record)}"


def _timed_on(record: TuningRecord) -> str:
    """Says which picks a measured entry was timed on, and what its schedule takes on each kind of them."""
    if record.kind == PREDICTED:
        return ""
    each = ", ".join(f"{own.median_ms:.3g} ms on {name}" for name, (own, _) in record.by_inputs.items())
    return f", timed on {record.inputs}" + (f" ({each})" if each else "")


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


@click.command(short_help="Write the user's tuned schedules to FILE.")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--device", help="Take only this device's: auto, cpu, cuda:0, h100, sm_90, …; all if left out.")
def export(file: Path, device: str | None) -> None:
    """Write the user's tuned schedules to FILE, for `import` on another machine.

    \b
    Examples:
      hsa-compile schedules export schedules.json
      hsa-compile schedules export h100.json --device cuda:0
    """
    slug = Target.parse(device).slug if device else None
    entries = default_cache().entries()
    records = [r for origin, r in entries if origin == "user" and slug in (None, r.target.slug)]
    if not records:
        raise InvalidArgument(
            "there is nothing to export: no schedule was tuned" + (f" for {device}" if device else "")
        )
    export_records(file, records)
    click.echo(f"wrote {len(records)} schedules to {file}")


@click.command("import", short_help="Add the better ones of the schedules in FILE.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def import_(file: Path) -> None:
    """Add the schedules in FILE that are better than one's own: measured rather than predicted, then newer.

    Files of another version of hsa-compile are refused, and entries tuned for kernels of another text left out.

    \b
    Example:
      hsa-compile schedules import schedules.json
    """
    found = import_records(file)
    if found.foreign and not found.records:
        raise InvalidArgument(f"all {found.foreign} entries of {file} were tuned for kernels of another text")
    merged = default_cache().merge(found.records)
    left_out = f", {found.foreign} left out (tuned for kernels of another text)" if found.foreign else ""
    click.echo(f"{merged.added} new, {merged.replaced} replaced, {merged.kept} kept as they were{left_out}")


_LIST_LEGEND = {
    "#": "the number that show and diff take",
    "from": "user: tuned or imported here; pretuned: shipped with the package",
    "kind": "measured on its device, or predicted for one that was not there",
    "device": "the device that it was tuned for",
    "problem": "the op, and its shape in the letters of docs/hsa.md",
    "schedule": "the winner: the dataflow, then its knobs",
    "time": "the median time of the winner",
    "gain": GAIN,
    "tried": "how many candidates the search tried",
    "tuned": "the day on which the search ended",
    "timed under": "this compiler, or the versions of another one; tune --verify times again",
    "kernels": "these, or others: then the templates have changed since, and the entry is not used",
}


@click.group()
def schedules() -> None:
    """List, show, explain, compare, move or remove tuned schedules.

    \b
    Example:
      hsa-compile schedules list
    """


@schedules.command("list", short_help="List all tuned schedules, one's own and shipped ones.")
@json_option
def list_(as_json: bool) -> None:
    """List all tuned schedules, the user's and those that ship with the package.

    A measured one was timed on its device; a predicted one is a model's choice for a device that was not there.

    \b
    Examples:
      hsa-compile schedules list
      hsa-compile schedules list --json
    """
    entries = list(default_cache().entries())
    if as_json:
        print_json([entry_values(number, origin, record) for number, (origin, record) in enumerate(entries, start=1)])
        return
    versions = installed_versions()
    rows = [
        {
            "#": number,
            "from": origin,
            "kind": record.kind,
            "device": record.target.name,
            "problem": record.problem.describe(),
            "schedule": str(record.schedule),
            "time": f"{record.measurement.median_ms:.3g} ms",
            "gain": f"{record.speedup:.2f}x",
            "tried": record.trials,
            "tuned": record.date[:10] + ("" if record.complete else ", not finished"),
            "timed under": record.outdated(versions) or "this compiler",
            "kernels": "these" if record.kernel_source == source_version(record.problem, record.target) else "others",
        }
        for number, (origin, record) in enumerate(entries, start=1)
    ]
    print_rows(rows, as_json=False, legend=_LIST_LEGEND, empty="nothing has been tuned yet: hsa-compile tune")


@schedules.command()
@click.argument("number", type=int)
def show(number: int) -> None:
    """Show everything about entry NUMBER of the list, as JSON.

    \b
    Example:
      hsa-compile schedules show 1
    """
    origin, record = entry_number(number)
    print_json(entry_values(number, origin, record))


@schedules.command()
@click.option("--device", default="auto", show_default=True, help="The device: auto, cpu, cuda:0, h100, sm_90, …")
def path(device: str) -> None:
    """Show the file that holds a device's schedules.

    A long file's newest entries lie in NAME.journal beside it; `export` takes both.

    \b
    Example:
      less "$(hsa-compile schedules path)"
    """
    click.echo(default_cache().path(Target.parse(device)))


@schedules.command()
@click.option("--device", help="Remove only this device's: auto, cpu, cuda:0, h100, …; all if left out.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def clear(device: str | None, yes: bool) -> None:
    """Remove the user's tuned schedules.

    \b
    Examples:
      hsa-compile schedules clear
      hsa-compile schedules clear --device cpu --yes
    """
    target = Target.parse(device) if device else None
    try:
        if not yes and not click.confirm(
            f"Remove all schedules of {target.name if target else 'every device'}?", err=True
        ):
            click.echo("removed nothing")
            return
    except click.Abort as error:
        if isinstance(error.__context__, EOFError):  # else it was Ctrl-C
            click.echo(err=True)  # ends the line of the question
            raise InvalidArgument("nobody answers on standard input; --yes removes without asking") from None
        raise
    click.echo(f"removed {default_cache().clear(target)} schedules")


for command in (explain, diff, export, import_):
    schedules.add_command(command)
