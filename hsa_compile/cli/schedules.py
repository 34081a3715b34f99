"""`hsa-compile schedules`: look at what was tuned, move it to another machine, or remove it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from hsa_compile.cli.options import (
    GAIN,
    SHAPE_FIELDS,
    expand,
    json_option,
    op_option,
    print_json,
    print_rows,
    shape_options,
)
from hsa_compile.errors import InvalidArgument
from hsa_compile.problem import Problem
from hsa_compile.schedules.cache import default_cache
from hsa_compile.schedules.exchange import FORMAT, export_records, import_records
from hsa_compile.schedules.explain import Difference, Explanation, Rival
from hsa_compile.schedules.explain import explain as explain_problem
from hsa_compile.schedules.ops import source_version
from hsa_compile.schedules.record import PREDICTED, TuningRecord
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.store import read_records
from hsa_compile.target import Target
from hsa_compile.versions import installed_versions


def entry_number(number: int) -> tuple[str, TuningRecord]:
    """Returns origin and record of an entry of the list.

    Raises:
        InvalidArgument: no entry has that number.
    """
    entries = list(default_cache().entries())
    if not 1 <= number <= len(entries):
        raise InvalidArgument(f"entry {number} does not exist; there are {len(entries)}")
    return entries[number - 1]


def entry_values(number: int, origin: str, record: TuningRecord) -> dict[str, Any]:
    """Returns everything about an entry, ready for JSON."""
    return {"number": number, "origin": origin, "speedup": record.speedup, **record.to_dict()}


@click.command(short_help="Compare two entries, files or devices.")
@click.argument("one")
@click.argument("other")
@json_option
def diff(one: str, other: str, as_json: bool) -> None:
    """Show what differs between ONE and OTHER: numbers of the list, files, or names of devices.

    Two entries are compared field by field; two files or devices, problem by problem.

    \b
    Examples:
      hsa-compile schedules diff 1 2
      hsa-compile schedules diff before.json after.json
      hsa-compile schedules diff cpu sm_90
    """
    if one.isdecimal() and other.isdecimal():
        rows = list(_entry_rows(entry_number(int(one))[1], entry_number(int(other))[1]))
        print_rows(rows, as_json=as_json, legend=_ENTRY_LEGEND, empty="the entries are equal")
        return
    rows = list(_problem_rows(_records(one), _records(other)))
    print_rows(rows, as_json=as_json, legend=_PROBLEM_LEGEND, empty="neither holds an entry")


_ENTRY_LEGEND = {
    "field": "a field in which the entries differ; schedules show says all of an entry",
    **dict.fromkeys(("one", "other"), "its value there"),
}
_PROBLEM_LEGEND = {
    "problem": "the op, and its shape in the letters of docs/hsa.md",
    **dict.fromkeys(("one", "other"), "schedule, median time and kind of the entry there"),
    "verdict": "whether both have the problem, the schedule, the whole entry",
}


def _entry_rows(one: TuningRecord, other: TuningRecord) -> Iterator[dict[str, str]]:
    left, right = dict(_flat(one.to_dict())), dict(_flat(other.to_dict()))
    for name in {**left, **right}:
        if left.get(name) != right.get(name):
            yield {"field": name, "one": _shown(left.get(name, "")), "other": _shown(right.get(name, ""))}


def _shown(value: Any) -> str:
    """Writes times with four digits, and schedules as everywhere else."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(str(Schedule.from_dict(item)) if isinstance(item, Mapping) else str(item) for item in value)
    return str(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _problem_rows(
    one: Mapping[Problem, TuningRecord], other: Mapping[Problem, TuningRecord]
) -> Iterator[dict[str, str]]:
    for problem in {**one, **other}:
        left, right = one.get(problem), other.get(problem)
        yield {
            "problem": problem.describe(),
            "one": _text(left),
            "other": _text(right),
            "verdict": _verdict(left, right),
        }


def _text(record: TuningRecord | None) -> str:
    return f"{record.schedule}: {record.measurement.median_ms:.3g} ms, {record.kind}" if record else ""


def _verdict(left: TuningRecord | None, right: TuningRecord | None) -> str:
    if left is None or right is None:
        return "only in the other" if left is None else "only in the one"
    if left.schedule != right.schedule:
        return "another schedule"
    return "same entry" if left == right else "same schedule"


def _records(name: str) -> dict[Problem, TuningRecord]:
    """Returns the entries of a file or a device by their problem, with lengths rounded as in the cache."""
    path = Path(name)
    if path.is_file():
        records = _records_in(path)
    elif name.isdecimal():
        raise InvalidArgument(f"{name} is the number of an entry; compare it with another number")
    elif path.suffix:
        raise InvalidArgument(f"file {name!r} does not exist")
    else:
        slug = Target.parse(name).slug
        records = [record for _, record in default_cache().entries() if record.target.slug == slug]
    return {record.problem.bucketed(): record for record in records}


def _records_in(path: Path) -> list[TuningRecord]:
    """Reads the entries of an exported file, or of a file of the cache."""
    if FORMAT in path.read_text(encoding="utf-8", errors="replace")[:200]:
        return list(import_records(path).records)
    records, damages = read_records(path)
    if damages:
        raise InvalidArgument(f"{path}: {damages[0]}")
    return list(records.values())


_MAX_RIVALS = 5


@click.command(short_help="Show which schedule a problem would run on, and why.")
@click.option("--device", default="auto", show_default=True, help="The device: auto, cpu, cuda:0, h100, sm_90, …")
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
            "tuned": record.date[:10] + ("" if record.complete else ", interrupted"),
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
    if not yes and not click.confirm(f"Remove all schedules of {target.name if target else 'every device'}?", err=True):
        click.echo("removed nothing")
        return
    click.echo(f"removed {default_cache().clear(target)} schedules")


for command in (explain, diff, export, import_):
    schedules.add_command(command)
