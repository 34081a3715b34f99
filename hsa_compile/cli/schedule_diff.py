"""`hsa-compile schedules diff`: what two entries, files or devices have in common, and where they differ."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from hsa_compile.cli.options import counted, json_option, print_rows
from hsa_compile.errors import InvalidArgument
from hsa_compile.problem import Problem
from hsa_compile.schedules.cache import default_cache
from hsa_compile.schedules.exchange import FORMAT, import_records
from hsa_compile.schedules.record import TuningRecord
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.store import read_records
from hsa_compile.target import Target

_Place = tuple[Problem, Target | None]  # what two files or devices are compared at


@click.command(short_help="Compare two entries, files or devices.")
@click.argument("one")
@click.argument("other")
@json_option
def diff(one: str, other: str, as_json: bool) -> None:
    """Show what differs between ONE and OTHER: numbers of the list, files, or names of devices.

    Two entries are compared field by field; two files or devices, problem by problem, and where one of them has entries
    of several devices, device by device.

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
    rows = list(_problem_rows(*_by_place(_records(one), _records(other))))
    print_rows(rows, as_json=as_json, legend=_PROBLEM_LEGEND, empty="neither holds an entry")


_ENTRY_LEGEND = {
    "field": "a field in which the entries differ; schedules show says all of an entry",
    **dict.fromkeys(("one", "other"), "its value there"),
}
_PROBLEM_LEGEND = {
    "problem": "the op, and its shape in the letters of docs/hsa.md",
    "device": "where it was tuned, since the one or the other has several devices",
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


def _by_place(*sides: Sequence[TuningRecord]) -> Iterator[dict[_Place, TuningRecord]]:
    """Yields each side's records by problem, with lengths rounded as in the cache; the last of a place counts.

    Where a side has several devices, the device is part of the place.
    """
    has_several = any(len({record.target for record in side}) > 1 for side in sides)
    for side in sides:
        yield {(record.problem.bucketed(), record.target if has_several else None): record for record in side}


def _problem_rows(one: Mapping[_Place, TuningRecord], other: Mapping[_Place, TuningRecord]) -> Iterator[dict[str, str]]:
    for place in {**one, **other}:
        problem, target = place
        left, right = one.get(place), other.get(place)
        yield {
            "problem": problem.describe(),
            **({"device": f"{target.name}, {counted(target.num_cores, 'core')}"} if target else {}),
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


def _records(name: str) -> list[TuningRecord]:
    """Returns the entries of a file, or those of a device: shipped ones, then the user's, which count for more."""
    path = Path(name)
    if path.is_file():
        return _records_in(path)
    if name.isdecimal():
        raise InvalidArgument(f"{name} is the number of an entry; compare it with another number")
    if path.suffix:
        raise InvalidArgument(f"file {name!r} does not exist")
    slug = Target.parse(name).slug
    entries = sorted(default_cache().entries(), key=lambda entry: entry[0] == "user")
    return [record for _, record in entries if record.target.slug == slug]


def _records_in(path: Path) -> list[TuningRecord]:
    """Reads the entries of an exported file, or of a file of the cache."""
    if FORMAT in path.read_text(encoding="utf-8", errors="replace")[:200]:
        return list(import_records(path).records)
    records, damages = read_records(path)
    if damages:
        raise InvalidArgument(f"{path}: {damages[0]}")
    return list(records.values())


def entry_number(number: int) -> tuple[str, TuningRecord]:
    """Returns origin and record of an entry of the list.

    Raises:
        InvalidArgument: no entry has that number.
    """
    entries = list(default_cache().entries())
    if not 1 <= number <= len(entries):
        raise InvalidArgument(f"entry {number} does not exist; there are {len(entries)}")
    return entries[number - 1]
