"""The public op, tuned and as shipped, against PyTorch's dense attention, FlexAttention and whoever else is named."""

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gpu_parts.lines import Lines
from hsa_compile.comparison import BOTH, FORWARD
from hsa_compile.comparison.contender import Case, Contender
from hsa_compile.comparison.contenders import OURS, contenders_for, load_contender
from hsa_compile.comparison.peaks import peaks_of
from hsa_compile.comparison.race import Race
from hsa_compile.errors import UntunedWarning
from hsa_compile.problem import Problem
from hsa_compile.schedules.cache import default_cache
from hsa_compile.target import Target

AS_SHIPPED = f"{OURS}, as shipped"  # without what was tuned here
LEFT_ASIDE = ("SDPA math", "SDPA efficient")  # slower than the other two wherever those run

_GRACE_S = 30.0  # beyond the share of a heat, before it is killed
_LEAST_S = {"cuda": 20.0, "cpu": 8.0}  # that a heat of weight 1 needs to start, to check and to time anything
_FLEX_S = 8.0  # left over, without which FlexAttention is not begun with: it compiles for as long
_CACHE_VARIABLE = "HSA_COMPILE_CACHE_DIR"


@dataclass(frozen=True)
class Heat:
    """What one process times: forward, and forward with backward, of one shape.

    Attributes:
        tokens, group, distribution: of the problem and of its picks.
        weight: its share of the time.
        flex: whether FlexAttention takes part, after all others.
    """

    tokens: int
    group: int
    distribution: str
    weight: float = 1.0
    flex: bool = False

    @property
    def name(self) -> str:
        """How its lines are marked."""
        return f"T{self.tokens} G{self.group} {self.distribution}"


def heats(target: Target) -> list[Heat]:
    """The most telling first; much shorter ones on a CPU."""
    if target.kind == "cpu":
        return [Heat(1024, group, name, flex=group == 4) for name in ("random", "trained") for group in (4, 1)]
    long, short = 64 << 10, 16 << 10
    found = [Heat(long, 16, "random", 1.5, flex=True), Heat(short, 16, "random", flex=True)]
    found += [Heat(tokens, group, "random") for group in (4, 1) for tokens in (long, short)]
    found += [Heat(tokens, group, "trained", flex=group == 16) for group in (16, 4, 1) for tokens in (long, short)]
    return [*found, Heat(1 << 20, 16, "random", 2.5)]


def problem_of(heat: Heat, target: Target) -> Problem:
    """The shape that a heat is about."""
    gpu = target.kind != "cpu"
    heads = 32 if gpu else 4
    return Problem(
        seq_len=heat.tokens,
        num_heads=heads,
        num_kv_heads=heads // heat.group,
        head_dim=128 if gpu else 32,
        chunk_size=64,
        top_k=16 if gpu else 4,
        dtype="bfloat16" if gpu else "float32",
    )


def run(out: Path, target: Target, device: str, seconds: float, files: Sequence[str]) -> None:
    """Runs one heat after the other, each in a process of its own, until the time is up."""
    deadline = time.monotonic() + seconds
    lines = Lines(out / "race.jsonl")
    ended = {row["heat"]: row["exit"] for row in lines.read() if row["kind"] == "heat" and row["files"] == list(files)}
    left = [heat for heat in heats(target) if ended.get(heat.name) != 0]
    left.sort(key=lambda heat: heat.name in ended)  # what failed once comes last
    while left:
        remaining = deadline - time.monotonic()
        share = remaining * (left[0].weight / sum(heat.weight for heat in left))  # never more than what remains
        allowed = max(share, _LEAST_S[device.split(":")[0]] * left[0].weight)
        if allowed > remaining:
            break
        heat = left.pop(0)
        kill_s = min(allowed + _GRACE_S, remaining + 5)
        lines.append({"kind": "heat", "files": list(files), **_in_a_process(heat, out, device, allowed, kill_s, files)})
    print(f"race: {len(heats(target)) - len(left)} of {len(heats(target))} heats", flush=True)


def _in_a_process(
    heat: Heat, out: Path, device: str, seconds: float, kill_s: float, files: Sequence[str]
) -> dict[str, Any]:
    """How a heat ended."""
    command = [sys.executable, str(Path(__file__).parents[1] / "gpu.py"), "--out", str(out)]
    command += ["--device", torch.device(device).type, "--heat", json.dumps(asdict(heat))]
    command += ["--until", f"{time.time() + seconds:.1f}"]
    for file in files:
        command += ["--contender", file]
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        try:
            code: int | str = subprocess.run(command, stderr=errors, timeout=kill_s, check=False).returncode
        except subprocess.TimeoutExpired:
            code = "killed"
        errors.seek(0)
        last = "\n".join(errors.read().strip().splitlines()[-3:])
    found = {"heat": heat.name, "exit": code, "seconds": round(time.monotonic() - start, 1)}
    return found if code == 0 else {**found, "error": last[-1000:]}


def run_heat(text: str, out: Path, target: Target, device: str, seconds: float, files: Sequence[str]) -> None:
    """Times all contenders on one shape, in this process; a line for each."""
    deadline = time.monotonic() + seconds
    heat = Heat(**json.loads(text))
    problem, place = problem_of(heat, target), torch.device(device)
    lines = Lines(out / "race.jsonl")
    peaks = {problem.dtype: peaks_of(target, problem.dtype)}

    def race(contenders: Sequence[Contender], *, but_ours: bool = False) -> None:
        left = max(1.0, deadline - time.monotonic())
        contest = Race(contenders, place, peaks, seconds=left, distribution=heat.distribution)
        for results in contest.run([(FORWARD, problem), (BOTH, problem)]):
            for result in results[1:] if but_ours else results:
                found = asdict(result)
                row = {"kind": "result", "heat": heat.name, "inputs": heat.distribution}
                lines.append({**row, "kind_of_case": found.pop("kind"), **found})

    with tempfile.TemporaryDirectory() as empty, warnings.catch_warnings():
        warnings.simplefilter("ignore", UntunedWarning)
        ours, *dense = contenders_for(place, ["sdpa"])
        named = [load_contender(text, [FORWARD, BOTH]) for text in files]
        race([ours, _as_shipped(ours, empty), *named, *(each for each in dense if each.name not in LEFT_ASIDE)])
        # Apart, so that what was timed is written before PyTorch compiles for long, or fails to.
        if heat.flex and deadline - time.monotonic() > _FLEX_S:
            race(contenders_for(place, ["flex"]), but_ours=True)


def _as_shipped(ours: Contender, empty: str) -> Contender:
    """The same ops as they run for who tunes nothing: with an empty folder for the cache."""

    def make(case: Case) -> Callable[[], Any]:
        call = ours.make(case)

        def with_empty_cache() -> Any:
            with _cache_in(empty):
                return call()

        return with_empty_cache

    def check(case: Case, call: Callable[[], Any]) -> None:
        with _cache_in(empty):
            ours.check(case, call)

    def note(case: Case) -> str:
        with _cache_in(empty):
            return ours.note(case)

    return replace(ours, name=AS_SHIPPED, make=make, check=check, note=note)


@contextmanager
def _cache_in(folder: str) -> Iterator[None]:
    """Has lookups read another folder. What kernels a call resolved to is remembered by the generation of the cache."""
    before = os.environ.get(_CACHE_VARIABLE)
    os.environ[_CACHE_VARIABLE] = folder
    try:
        if default_cache().generation == 0:
            default_cache().generation = -1
        yield
    finally:
        if before is None:
            del os.environ[_CACHE_VARIABLE]
        else:
            os.environ[_CACHE_VARIABLE] = before
