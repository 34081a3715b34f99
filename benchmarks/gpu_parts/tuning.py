"""Tunes a fixed list of problems, the most used first, with all cores for compiling and a quiet device for timing."""

import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gpu_parts.lines import Lines
from gpu_parts.pool import START_S, Outcome, Pool, Worker, outcome_of
from hsa_compile.autotune.bench.bench import quantile, summarize
from hsa_compile.autotune.bench.device import clocks_mhz
from hsa_compile.kernels.emit import emit
from hsa_compile.problem import Problem
from hsa_compile.schedules.cache import ScheduleCache, default_cache
from hsa_compile.schedules.record import TuningRecord
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.schedules.store import read_records, write_records
from hsa_compile.target import Target
from hsa_compile.versions import installed_versions

LIMIT_S = 45.0  # for compiling and checking one candidate
TIME_LIMIT_S = 30.0  # for timing one
LOAD_LIMIT_S = 120.0  # for making the inputs
INPUTS = "random and trained"

_COMPILE_SHARE = 0.5  # of the time of a round; the rest is for timing
_FIRST_ROUND = 0.6  # of the time of a problem; the rest is for the neighbours of the best
_PARENTS = 2  # whose neighbours are tried
_PLAY_OFF_S = 4.0  # that is kept for the best few
_FINALISTS, _ROUNDS = 3, 11
_ENOUGH_FASTER = 0.98  # of the default's time: what is closer may be noise
_LEAST_S = {"cuda": 30.0, "cpu": 9.0}  # that a problem of weight 1 is given
_HEIRS = 12  # schedules that a shorter problem takes over from the longer one

# Fast on an H100 at 64K tokens, for some group of heads or some kind of picks: tried right after the default.
PORTFOLIO = {
    "hsa_forward": (
        "fused discard=0 num_stages=2 num_warps=4 reduce=slots segment=64 super_tile=2048 unroll=8 window=0",
        "fused discard=0 num_stages=2 num_warps=4 reduce=slots segment=256 super_tile=4096 unroll=8 window=0",
        "fused discard=0 num_stages=2 num_warps=4 reduce=slots segment=256 super_tile=8192 unroll=8 window=0",
        "fused discard=0 num_stages=1 num_warps=4 reduce=slots segment=512 super_tile=16384 unroll=8 window=0",
        "fused discard=0 num_stages=2 num_warps=4 reduce=slots segment=1024 super_tile=32768 unroll=8 window=0",
        "fused discard=0 num_stages=2 num_warps=4 reduce=slots segment=1024 super_tile=65536 unroll=8 window=0",
        "union block_tokens=4 num_stages=2 num_warps=4",
        "union block_tokens=4 num_stages=1 num_warps=4",
        "union block_tokens=8 num_stages=2 num_warps=4",
        "fused discard=0 num_stages=2 num_warps=4 reduce=slots segment=128 super_tile=4096 unroll=8 window=0",
        "fused discard=0 num_stages=2 num_warps=4 reduce=slots segment=64 super_tile=4096 unroll=8 window=0",
        "fused discard=0 num_stages=2 num_warps=4 reduce=slots segment=128 super_tile=2048 unroll=8 window=0",
        "fused discard=0 num_stages=2 num_warps=4 reduce=slots segment=512 super_tile=16384 unroll=8 window=0",
        "fused discard=0 num_stages=1 num_warps=4 reduce=slots segment=256 super_tile=8192 unroll=8 window=0",
        "fused discard=0 num_stages=1 num_warps=4 reduce=slots segment=1024 super_tile=32768 unroll=8 window=0",
        "fused discard=0 num_stages=2 num_warps=4 reduce=slots segment=4096 super_tile=65536 unroll=8 window=0",
        "fused discard=0 num_stages=2 num_warps=4 reduce=slots segment=64 super_tile=1024 unroll=8 window=0",
        "fused discard=0 num_stages=1 num_warps=4 reduce=slots segment=128 super_tile=4096 unroll=8 window=0",
        "fused discard=0 num_stages=3 num_warps=4 reduce=slots segment=64 super_tile=4096 unroll=8 window=0",
        "fused discard=0 num_stages=2 num_warps=4 reduce=fused segment=16 super_tile=1024 unroll=8 window=0",
        "fused discard=0 num_stages=1 num_warps=4 reduce=fused segment=256 super_tile=4096 unroll=8 window=0",
        "fused discard=0 num_stages=2 num_warps=4 reduce=fused segment=64 super_tile=2048 unroll=8 window=0",
        "fused discard=1 num_stages=2 num_warps=4 reduce=fused segment=16 super_tile=512 unroll=8 window=0",
        "chunk block_entries=4 num_stages=3 num_warps=4 reduce=slots16 segment=512 super_tile=0",
        "chunk block_entries=64 num_stages=2 num_warps=4 reduce=slots16 segment=2048 super_tile=0",
        "chunk block_entries=64 num_stages=2 num_warps=4 reduce=atomic segment=2048 super_tile=0",
        "chunk block_entries=16 num_stages=3 num_warps=4 reduce=slots16 segment=512 super_tile=0",
        "token num_stages=3 num_warps=4",
        "token num_stages=2 num_warps=2",
        "union block_tokens=2 num_stages=2 num_warps=4",
    ),
    "hsa_backward": (
        "fused discard=0 num_stages=2 num_warps=8 reduce=slots segment=512 super_tile=8192 unroll=8 window=0",
        "fused discard=0 num_stages=2 num_warps=8 reduce=slots segment=1024 super_tile=16384 unroll=8 window=0",
        "fused discard=0 num_stages=2 num_warps=8 reduce=slots segment=1024 super_tile=32768 unroll=8 window=0",
        "fused discard=0 num_stages=2 num_warps=8 reduce=slots segment=4096 super_tile=65536 unroll=8 window=0",
        "chunk block_entries=128 num_stages=2 num_warps=8 reduce=slots16 segment=0 super_tile=0",
        "fused discard=0 num_stages=2 num_warps=8 reduce=slots segment=256 super_tile=4096 unroll=8 window=0",
        "fused discard=0 num_stages=2 num_warps=8 reduce=slots segment=1024 super_tile=8192 unroll=8 window=0",
        "fused discard=0 num_stages=2 num_warps=8 reduce=slots segment=1024 super_tile=65536 unroll=8 window=0",
        "fused discard=0 num_stages=2 num_warps=4 reduce=slots segment=256 super_tile=2048 unroll=8 window=0",
        "fused discard=0 num_stages=2 num_warps=4 reduce=slots segment=256 super_tile=4096 unroll=8 window=0",
        "fused discard=0 num_stages=2 num_warps=4 reduce=slots segment=1024 super_tile=16384 unroll=8 window=0",
        "fused discard=0 num_stages=2 num_warps=8 reduce=slots segment=512 super_tile=16384 unroll=8 window=0",
        "fused discard=0 num_stages=2 num_warps=8 reduce=slots segment=4096 super_tile=32768 unroll=8 window=0",
        "union block_entries=8 block_tokens=4 chunk_stages=2 chunk_warps=8 dk_dv=together num_stages=2 num_warps=4",
        "union block_entries=4 block_tokens=4 chunk_stages=2 chunk_warps=4 dk_dv=together num_stages=2 num_warps=4",
        "chunk block_entries=8 num_stages=2 num_warps=8 reduce=slots16 segment=2048 super_tile=0",
        "chunk block_entries=32 num_stages=2 num_warps=8 reduce=slots16 segment=2048 super_tile=0",
        "chunk block_entries=64 num_stages=2 num_warps=4 reduce=slots16 segment=0 super_tile=0",
        "chunk block_entries=128 num_stages=2 num_warps=8 reduce=slots16 segment=2048 super_tile=0",
        "chunk block_entries=4 num_stages=2 num_warps=4 reduce=slots16 segment=2048 super_tile=0",
        "fused discard=0 num_stages=2 num_warps=8 reduce=atomic segment=512 super_tile=8192 unroll=8 window=0",
        "fused discard=0 num_stages=2 num_warps=8 reduce=atomic segment=1024 super_tile=16384 unroll=8 window=0",
        "fused discard=0 num_stages=1 num_warps=4 reduce=atomic segment=256 super_tile=2048 unroll=8 window=0",
        "fused discard=0 num_stages=2 num_warps=8 reduce=fused segment=64 super_tile=1024 unroll=8 window=0",
        "fused discard=0 num_stages=2 num_warps=8 reduce=fused segment=256 super_tile=2048 unroll=8 window=0",
        "fused discard=0 num_stages=1 num_warps=4 reduce=slots segment=1024 super_tile=16384 unroll=8 window=0",
        "fused discard=0 num_stages=2 num_warps=4 reduce=slots segment=4096 super_tile=65536 unroll=8 window=0",
        "fused discard=0 num_stages=2 num_warps=8 reduce=slots segment=512 super_tile=4096 unroll=8 window=0",
        "chunk block_entries=64 num_stages=2 num_warps=8 reduce=atomic segment=2048 super_tile=0",
        "union block_entries=8 block_tokens=2 chunk_stages=2 chunk_warps=8 dk_dv=together num_stages=2 num_warps=4",
        "token block_entries=8 chunk_stages=2 chunk_warps=8 dk_dv=together num_stages=1 num_warps=4",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A problem of the list, and its share of the time."""

    problem: Problem
    weight: float


def entries(target: Target) -> list[Entry]:
    """What is tuned, the most used first; much shorter problems on a CPU."""
    gpu = target.kind != "cpu"
    long, short = (65536, 16384) if gpu else (1024, 512)
    heads = 32 if gpu else 4
    kv_heads = (2, 8, 32) if gpu else (1, 4)
    dtype = "bfloat16" if gpu else "float32"
    shape = {"head_dim": 128 if gpu else 32, "chunk_size": 64, "top_k": 16 if gpu else 4, "dtype": dtype}
    found = []
    for tokens, share in ((long, 1.0), (short, 0.5)):
        for kv in kv_heads:
            for op, weight in (("hsa_forward", 1.0), ("hsa_backward", 1.35)):
                problem = Problem(op=op, seq_len=tokens, num_heads=heads, num_kv_heads=kv, **shape)
                found.append(Entry(problem, share * weight))
        select = Problem(op="select_chunks", seq_len=tokens, num_heads=2, num_kv_heads=2, **shape)
        found.append(Entry(select, share * 0.7))
        if tokens == long:
            decode = Problem(
                op="hsa_decode", batch=4, seq_len=1, kv_len=64 * (1024 if gpu else 64), num_heads=heads,
                num_kv_heads=kv_heads[0], paged=True, **shape,
            )  # fmt: skip
            found.append(Entry(decode, share * 0.5))
    return found


def candidates(problem: Problem, target: Target, heirs: list[Schedule], seed: int = 0) -> Iterator[Schedule]:
    """The default, what was best on a longer problem, the portfolio, then all others in any order."""
    space = SearchSpace.of(problem, target)
    listed = [space.default(), *heirs, *map(Schedule.parse, PORTFOLIO.get(problem.op, ()))]
    known = list(dict.fromkeys(schedule for schedule in listed if space.is_valid(schedule)))
    yield from known
    others = [schedule for schedule in space.schedules() if schedule not in known]
    random.Random(seed).shuffle(others)
    yield from others


def neighbours(problem: Problem, target: Target, best: list[Schedule]) -> Iterator[Schedule]:
    """The schedules that differ from one of the best in one knob by one step."""
    space = SearchSpace.of(problem, target)
    for schedule in best:
        for name, choices in space.choices[schedule.dataflow].items():
            place = choices.index(schedule[name])
            for value in (*choices[max(0, place - 1) : place], *choices[place + 1 : place + 2]):
                near = Schedule.from_dict({**schedule, name: value})
                if space.is_valid(near):
                    yield near


def run(out: Path, target: Target, device: str, seconds: float) -> None:
    """Tunes one problem after the other until the time is up; the winners are in the cache and in `pretuned.json`."""
    deadline = time.monotonic() + seconds
    lines, cache = Lines(out / "tune.jsonl"), default_cache()
    pretuned = out / "pretuned.json"
    cache.merge(read_records(pretuned)[0].values())  # a machine that goes on with another's work has an empty cache
    rows = lines.read()
    done = {row["problem"] for row in rows if row["kind"] == "winner"}
    left = [entry for entry in entries(target) if entry.problem.describe() not in done]
    timer = Worker("gpu_parts.benches:Timer", (target, device))
    try:
        # One thread for loading, as long as all lasts: Linux ends a worker with the thread that started it.
        with Pool("gpu_parts.benches:Compiler", (target, device)) as pool, ThreadPoolExecutor(1) as loader:
            pool.start()
            loader.submit(outcome_of, timer, "hello", (), START_S).result()
            while left:
                now = time.monotonic()
                share = left[0].weight / sum(entry.weight for entry in left)
                # With less a problem finds nothing: the first ones get all there is, and the last ones nothing.
                slot = max((deadline - now) * share, _LEAST_S[device.split(":")[0]] * left[0].weight)
                if now + slot > deadline + 1:
                    break
                problem = left.pop(0).problem
                tuned = Tuned(problem, target, device, lines, pool, timer, loader)
                record = tuned.record(now + slot, _heirs(problem, lines.read()))
                if record is not None:
                    keep(record, cache, pretuned, lines)
    finally:
        timer.close()
    print(f"tune: {len(entries(target)) - len(left)} of {len(entries(target))} problems, winners in {pretuned}")


def _heirs(problem: Problem, rows: list[dict[str, Any]]) -> list[Schedule]:
    """The best schedules of a longer problem of the same kind."""
    same = [
        row for row in rows
        if row["kind"] == "timed" and row["op"] == problem.op and row["kv_heads"] == problem.num_kv_heads
        and row["seq_len"] > problem.seq_len
    ]  # fmt: skip
    best = sorted(same, key=lambda row: row["ms"])[:_HEIRS]
    return [Schedule.parse(row["schedule"]) for row in best]


def keep(record: TuningRecord, cache: ScheduleCache, pretuned: Path, lines: Lines) -> None:
    """Stores a winner as `tune` does: not if too few were timed."""
    if record.shortfall is None:
        cache.put(record)
        mine = [entry for origin, entry in cache.entries() if origin == "user"]
        write_records(pretuned, [entry for entry in mine if entry.target == record.target])
    lines.append(
        {
            "kind": "winner",
            "problem": record.problem.describe(),
            "schedule": str(record.schedule),
            "ms": record.measurement.median_ms,
            "default_ms": record.default_measurement.median_ms,
            "speedup": round(record.speedup, 4),
            "trials": record.trials,
            "failures": dict(record.failures),
            "verdict": record.verdict,
            "stored": record.shortfall is None,
        }
    )
    print(f"{record.problem.describe()}: {record.verdict}", flush=True)


class Tuned:
    """The tuning of one problem.

    Args:
        problem, target, device: what is tuned and where.
        lines: where each candidate gets its line.
        pool: compiles and checks.
        timer: times, while the pool rests.
        loader: has the timer make its inputs while the pool compiles.
    """

    def __init__(
        self,
        problem: Problem,
        target: Target,
        device: str,
        lines: Lines,
        pool: Pool,
        timer: Worker,
        loader: ThreadPoolExecutor,
    ) -> None:
        self.problem, self.target, self.device = problem, target, device
        self.lines, self.pool, self.timer, self.loader = lines, pool, timer, loader
        self.failures: Counter[str] = Counter()
        self.compile_s: dict[Schedule, float] = {}
        self.times: dict[Schedule, float] = {}
        self._seen: set[Schedule] = set()

    def record(self, deadline: float, heirs: list[Schedule]) -> TuningRecord | None:
        """The winner; None where the default itself could not be timed."""
        start = time.monotonic()
        end = deadline - _PLAY_OFF_S
        loading = self.loader.submit(outcome_of, self.timer, "load", (self.problem,), LOAD_LIMIT_S)
        self._round(candidates(self.problem, self.target, heirs), start + _FIRST_ROUND * (end - start), loading)
        best = sorted(self.times, key=lambda each: self.times[each])[:_PARENTS]
        self._round(neighbours(self.problem, self.target, best), end)
        default = SearchSpace.of(self.problem, self.target).default()
        if default not in self.times:
            self._line("no winner", default, {"error": "the default schedule was not timed"})
            return None
        return self._decide(default)

    def _line(self, kind: str, schedule: Schedule, more: Mapping[str, Any]) -> None:
        problem = self.problem
        about = {"op": problem.op, "kv_heads": problem.num_kv_heads, "seq_len": problem.seq_len}
        row = {"kind": kind, "problem": problem.describe(), **about, "schedule": str(schedule), **more}
        self.lines.append(row)

    def _round(self, listed: Iterator[Schedule], deadline: float, loading: "Future[Outcome] | None" = None) -> None:
        """Checks and compiles what is listed on all cores, then, while they rest, times it."""
        start, before = time.monotonic(), list(self.compile_s)
        self._compile(listed, start + _COMPILE_SHARE * (deadline - start))
        if loading is not None:
            loading.result()  # if it failed, the next attempt says why
        new = [schedule for schedule in self.compile_s if schedule not in before]
        self._time([*new, *before], deadline)

    def _compile(self, listed: Iterator[Schedule], deadline: float) -> None:
        def on_outcome(arguments: tuple[Problem, Schedule], outcome: Outcome) -> None:
            schedule = arguments[1]
            if outcome["status"] == "ok":
                self.compile_s[schedule] = outcome["seconds"]
            else:
                self._failed(schedule, outcome)

        def unseen() -> Iterator[tuple[Problem, Schedule]]:
            for schedule in listed:
                if schedule not in self._seen:
                    self._seen.add(schedule)
                    yield self.problem, schedule

        self.pool.map("prepare", unseen(), limit_s=LIMIT_S, deadline=deadline, on_outcome=on_outcome)

    def _failed(self, schedule: Schedule, outcome: Outcome) -> None:
        self.failures[outcome["status"]] += 1
        self._line("failed", schedule, outcome)

    def _time(self, compiled: list[Schedule], deadline: float) -> None:
        """Times what has no time yet, the default before all, until it is late."""
        default = SearchSpace.of(self.problem, self.target).default()
        left = [schedule for schedule in compiled if schedule not in self.times]
        for schedule in sorted(left, key=lambda each: each != default):
            if self.times and time.monotonic() > deadline:
                return
            if not self._load():
                return
            best = min(self.times.values(), default=float("inf"))
            outcome = outcome_of(self.timer, "time", (schedule, best), TIME_LIMIT_S)
            if outcome["status"] != "ok":
                del self.compile_s[schedule]
                self._failed(schedule, outcome)
                continue
            found = outcome["result"]
            self.times[schedule] = found["ms"]
            self._line("timed", schedule, {**found, "compile_s": self.compile_s[schedule]})

    def _load(self) -> bool:
        """Has the timer hold the inputs of this problem, again if it had to be replaced."""
        outcome = outcome_of(self.timer, "load", (self.problem,), LOAD_LIMIT_S)
        if outcome["status"] != "ok":
            self._line("not loaded", SearchSpace.of(self.problem, self.target).default(), outcome)
        return outcome["status"] == "ok"

    def _decide(self, default: Schedule) -> TuningRecord:
        """The best few against the default once more, in turns, after their results on the real inputs are compared."""
        ranked = sorted((s for s in self.times if s != default), key=lambda each: self.times[each])
        finalists: list[Schedule] = []
        for schedule in ranked:
            if len(finalists) == _FINALISTS or self.times[schedule] > 1.1 * self.times[ranked[0]]:
                break
            self._load()
            outcome = outcome_of(self.timer, "compare", (schedule, default), TIME_LIMIT_S)
            if outcome["status"] == "ok":
                finalists.append(schedule)
            else:
                self._failed(schedule, outcome)
        contenders = [default, *finalists]
        self._load()
        rounds = max(3, min(_ROUNDS, int(_PLAY_OFF_S * 1e3 / (2 * len(contenders) * self.times[default]))))
        outcome = outcome_of(self.timer, "play_off", (contenders, rounds), TIME_LIMIT_S)
        if outcome["status"] != "ok":  # what was timed before still stands, for the default alone
            self._line("no play-off", default, outcome)
            return self._record(default, [self.times[default]], [self.times[default]])
        means = [_means(found) for found in outcome["result"]]
        for schedule, found in zip(contenders, outcome["result"], strict=True):
            medians = {f"{name}_ms": round(quantile(times, 0.5), 5) for name, times in found.items()}
            self._line("final", schedule, {**medians, "rounds": rounds})
        medians = [quantile(times, 0.5) for times in means]
        best = medians.index(min(medians))
        if medians[best] > _ENOUGH_FASTER * medians[0]:
            best = 0
        return self._record(contenders[best], means[best], means[0])

    def _record(self, winner: Schedule, times: list[float], default_times: list[float]) -> TuningRecord:
        measured, default = summarize(times), summarize(default_times)
        ratio = default.median_ms / measured.median_ms
        return TuningRecord(
            problem=self.problem,
            target=self.target,
            schedule=winner,
            measurement=measured,
            default_measurement=default,
            trials=len(self.times) + self.failures.total(),
            failures=dict(self.failures),
            inputs=INPUTS,
            fingerprint=emit(self.problem, winner, self.target).fingerprint,
            versions=installed_versions(),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            verdict=f"{winner} takes {measured.median_ms:.3f} ms, {ratio:.2f} times as fast as the default",
            clocks_mhz=clocks_mhz(self.device),
        )


def _means(found: Mapping[str, list[float]]) -> list[float]:
    """The geometric mean over the distributions, round by round."""
    return [(a * b) ** 0.5 for a, b in zip(*found.values(), strict=True)]
