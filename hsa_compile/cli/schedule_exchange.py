"""`hsa-compile schedules export` and `import`: tuned schedules from one machine to another."""

from pathlib import Path

import click

from hsa_compile.errors import InvalidArgument
from hsa_compile.schedules.cache import default_cache
from hsa_compile.schedules.exchange import export_records, import_records
from hsa_compile.target import Target


@click.command(short_help="Write the user's tuned schedules to FILE.")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--device", help="Only this device's: auto, cpu, cuda:0, sm_90, …  Without it, all.")
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
