"""`hsa-compile doctor`: what will work on this machine, and what will not."""

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass

import click

from hsa_compile.cli.options import counted, json_option, print_json
from hsa_compile.paths import cache_dir, cxx_compiler
from hsa_compile.schedules.cache import default_cache
from hsa_compile.schedules.store import read_records
from hsa_compile.target import Target
from hsa_compile.versions import installed_versions


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report: what was looked at, whether it is well, and the fact."""

    name: str
    ok: bool
    text: str


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Show the device, versions, the cache, and what will work here, a line each.

    \b
    Example:
      hsa-compile doctor
    """
    findings = list(_findings())
    if as_json:
        print_json([{"name": finding.name, "ok": finding.ok, "text": finding.text} for finding in findings])
        return
    for finding in findings:
        click.echo(f"{'ok' if finding.ok else '--':3} {finding.name:11} {finding.text}")


def _findings() -> Iterator[Finding]:
    yield Finding(name="python", ok=True, text=platform.python_version())
    for name, version in installed_versions().items():
        yield Finding(name=name, ok=version != "not installed", text=version)
    cpu = Target.parse("cpu")
    yield Finding(name="cpu", ok=True, text=f"{cpu.name}, {cpu.arch}, {counted(cpu.num_cores, 'thread')}: tune and run")
    yield _compiler()
    yield _gpu()
    yield _gpu_sources()
    yield from _cache()


def _compiler() -> Finding:
    if compiler := cxx_compiler():
        return Finding(
            name="c++", ok=True, text=f"{' '.join(compiler)}: CPU kernels are emitted as C++ (float32, bfloat16)"
        )
    return Finding(
        name="c++", ok=False, text="no C++ compiler: CPU kernels are emitted as PyTorch, about twice as slow"
    )


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding(name="gpu", ok=False, text="PyTorch finds none: GPU kernels cannot be tuned or run here")
    gpu = Target.parse("cuda")
    return Finding(name="gpu", ok=True, text=f"{gpu.name}, {gpu.arch}, {gpu.num_cores} multiprocessors: tune and run")


def _gpu_sources() -> Finding:
    if installed_versions()["triton"] == "not installed":
        return Finding(name="emit", ok=True, text="sm_80, sm_90, sm_100, gfx942: sources only, Triton is not installed")
    return Finding(name="emit", ok=True, text="sm_80, sm_90, sm_100, gfx942: sources, and compiled without the device")


def _cache() -> Iterator[Finding]:
    root = cache_dir()
    existing = next(path for path in (root, *root.parents) if path.exists())
    writable = os.access(existing, os.W_OK) and existing.is_dir()
    origins = [origin for origin, _ in default_cache().entries()]
    counts = f"{counted(origins.count('user'), 'tuned schedule')}, {origins.count('pretuned')} from the package"
    text = f"{root}, {counts}" if writable else f"{root} cannot be written: tuning is not kept"
    yield Finding(name="cache", ok=writable, text=text)
    for path in sorted(default_cache().directory.glob("*.json")):
        for damage in read_records(path)[1]:
            yield Finding(name="cache", ok=False, text=f"{path}: {damage}")
