"""`hsa-compile --version`: the package, and what its kernels depend on here."""

import platform

import click

from hsa_compile import __version__
from hsa_compile.cli.options import counted
from hsa_compile.target import Target
from hsa_compile.versions import installed_versions


def print_version(context: click.Context, _: click.Parameter, asked: bool) -> None:
    """Prints and ends, if the flag was given; what it takes to find out is done only then."""
    if not asked or context.resilient_parsing:
        return
    versions, target = installed_versions(), Target.current()
    click.echo(f"hsa-compile, version {__version__}")
    click.echo(f"torch {versions['torch']}, Triton {versions['triton']}, Python {platform.python_version()}")
    click.echo(f"device {target.name} ({target.kind} {target.arch}, {counted(target.num_cores, 'core')})")
    context.exit()
