"""`hsa-compile report`: what searches found, as one page that needs nothing but itself."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hsa_compile.cli.options import RestrictedOption, counted
from hsa_compile.errors import InvalidArgument, SaveError
from hsa_compile.target import Target

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study._frozen import FrozenStudy

    from hsa_compile.cli.tuning.report_page import Search
    from hsa_compile.comparison.peaks import Peaks

MIN_TIMED = 2  # with fewer candidates there is nothing to compare


@click.command()
@click.option("--study", "names", multiple=True, help="Show this study; may be repeated. A wrong name lists all.")
@click.option("--storage", "address", help="Where tune kept the trials; this device's journal if left out.")
@click.option(
    "--device",
    cls=RestrictedOption,
    excludes=("--storage",),
    because="a storage is named, and --device only finds one",
    default="auto",
    show_default=True,
    help="The device whose journal is read: auto, cpu, cuda:0, h100, …",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default="report.html",
    show_default=True,
    help="The file to write.",
)
def report(names: tuple[str, ...], address: str | None, device: str, out: Path) -> None:
    """Write what searches found as one HTML page of at most 1 MB, to be read without a network.

    The page has the latest search of each problem in the storage: its verdict, its candidates over time, a roofline
    with the winner, what each value of a knob costs, a table of all candidates, and the machine. `optuna-dashboard`
    opens the same storage, live while a search runs.

    \b
    Examples:
      hsa-compile report
      hsa-compile report --device h100 --out h100.html
      hsa-compile report --storage postgresql://user@host/tuning
      hsa-compile report --study hsa_forward-0123456789abcdef.1
    """
    from hsa_compile.autotune.study.storage import answering, close_storage, default_storage, open_to_read
    from hsa_compile.cli.tuning.report_page import page

    address = address or default_storage(Target.parse(device))
    storage = open_to_read(address)
    with answering(address):
        searches, short = _chosen(storage, names, address)
        close_storage(storage)
    text, left_out = page(searches, [_peaks(search.target, search.problem.dtype) for search in searches])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise SaveError(f"{out} cannot be written: {error.strerror or error}") from error
    shown, hidden, few = (counted(n, "search", "es") for n in (len(searches) - left_out, left_out, short))
    size = len(text.encode(errors="replace")) / 1e3
    click.echo(f"{out}: {shown}, {size:.0f} kB")
    if left_out:
        click.echo(f"not shown for lack of room: {hidden}, the oldest; --study NAME shows one", err=True)
    if short:
        click.echo(f"not shown, with fewer than {MIN_TIMED} timed candidates: {few}", err=True)


def _chosen(storage: BaseStorage, names: Sequence[str], address: str) -> tuple[list[Search], int]:
    """Returns the searches to show, the oldest first, and how many of those asked for have too little to show.

    Raises:
        InvalidArgument: a name is unknown, or nothing is left to show.
    """
    ours = [study for study in storage.get_all_studies() if {"problem", "target"} <= study.user_attrs.keys()]
    known = ", ".join(study.study_name for study in ours) or "none"
    for name in names:
        if name not in [study.study_name for study in ours]:
            raise InvalidArgument(f"study {name!r} does not exist in {address}; there are: {known}")
    chosen = [study for study in ours if study.study_name in names] if names else _latest(ours)
    read = [_read(study, storage) for study in chosen]
    found = [search for search in read if search is not None and len(search.timed) >= MIN_TIMED]
    if not found:
        raise InvalidArgument(
            f"no study in {address} has {counted(MIN_TIMED, 'timed candidate')}; there are: {known}; "
            "hsa-compile tune makes one"
        )
    return found, len(read) - len(found)


def _read(study: FrozenStudy, storage: BaseStorage) -> Search | None:
    """Returns a search; None if its study is of another version, or damaged so that its trials contradict it."""
    from hsa_compile.cli.tuning.report_page import Search

    try:
        return Search.read(study, storage.get_all_trials(study._study_id))
    except ValueError:
        return None


def _latest(studies: Sequence[FrozenStudy]) -> list[FrozenStudy]:
    """Returns the last study of each problem on each device, in the order in which they were begun."""
    latest: dict[str, Any] = {}
    for study in studies:
        key = repr((study.user_attrs["problem"], study.user_attrs["target"]))
        latest.pop(key, None)
        latest[key] = study
    return list(latest.values())


@functools.cache
def _peaks(target: Target, dtype: str) -> Peaks | None:
    """Returns the roofs of a device; a CPU's are measured, so they are known only on the CPU itself."""
    from hsa_compile.comparison.peaks import peaks_of

    if target.kind == "cpu":
        here = Target.parse("cpu")
        if (here.name, here.arch, here.num_cores) != (target.name, target.arch, target.num_cores):
            return None
    return peaks_of(target, dtype)
