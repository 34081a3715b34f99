"""What a schedule tuned for another shape costs: every shape's winner on every other shape, by distance.

    python benchmarks/regret.py                  # on this machine's CPU; prints the table
    python benchmarks/regret.py --device cuda:0  # on a GPU
    python benchmarks/regret.py --write          # and keeps it in the package, where lookup and explain read it

Each shape's winner is the fastest of a sample of its schedules. Then the winners of all shapes, cut to the shape as
lookup cuts them, and the default are timed in turns with the shape's own: the share of time that each loses is put
into a bin by the distance of the two shapes' keys. Nothing that was tuned for a shape is used for the shape itself.
"""

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

import torch

from hsa_compile import Problem, Schedule, SearchSpace, Target, default_schedule
from hsa_compile.autotune.bench.bench import measure, prepare, quantile
from hsa_compile.cli.options import default_fields
from hsa_compile.errors import CompileError, OutOfResources, WrongResult
from hsa_compile.kernels.ops import inputs_of
from hsa_compile.paths import REGRET_FILE
from hsa_compile.problem import OPS
from hsa_compile.schedules.key import ScheduleKey
from hsa_compile.versions import installed_versions

BINS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
CPU_SHAPES = ((512, 8), (1024, 4), (2048, 8), (2048, 16), (4096, 4), (8192, 8))  # T, K
GPU_SHAPES = ((2048, 16), (4096, 8), (8192, 16), (16384, 8), (16384, 32), (32768, 16), (65536, 8))
SWEEP_ROUNDS, FINAL_ROUNDS = 3, 11


@dataclass(frozen=True)
class Pair:
    """The winner of one shape, or the default, on another: the key's distance, and the share of time lost."""

    distance: float
    loss: float
    default_loss: float


def shapes(target: Target, op: str) -> list[Problem]:
    lengths = CPU_SHAPES if target.kind == "cpu" else GPU_SHAPES
    fields = default_fields(target)
    return [Problem(op=op, **{**fields, "seq_len": seq_len, "top_k": top_k}) for seq_len, top_k in lengths]


def sample(problem: Problem, target: Target, count: int) -> list[Schedule]:
    """The default and a random sample of the other schedules: the same knobs for all shapes, so that few are built."""
    everywhere = list(SearchSpace.of(replace(problem, seq_len=1 << 20), target).schedules())
    random.Random(0).shuffle(everywhere)
    space = SearchSpace.of(problem, target)
    valid = [schedule for schedule in everywhere if space.is_valid(schedule)]
    return list(dict.fromkeys([default_schedule(problem, target), *valid[:count]]))


class Timer:
    """Times schedules of one problem in turns; what fails is left out."""

    def __init__(self, problem: Problem, target: Target, device: torch.device) -> None:
        self.problem, self.target, self.device = problem, target, device
        self.inputs = inputs_of(problem, device, distribution="random", seed=0)

    def times(self, schedules: list[Schedule], rounds: int) -> dict[Schedule, list[float]]:
        candidates = {}
        for schedule in schedules:
            try:
                candidates[schedule] = prepare(self.problem, schedule, self.target, self.inputs)
            except (CompileError, OutOfResources, WrongResult) as error:
                print(f"    {schedule}: {type(error).__name__}", file=sys.stderr)
        calls = [candidate.call for candidate in candidates.values()]
        return dict(zip(candidates, measure(calls, self.device, rounds=rounds), strict=True))


def winner_of(problem: Problem, target: Target, device: torch.device, count: int) -> Schedule:
    times = Timer(problem, target, device).times(sample(problem, target, count), SWEEP_ROUNDS)
    return min(times, key=lambda schedule: quantile(times[schedule], 0.5))


def pairs_of(
    problem: Problem, target: Target, device: torch.device, winners: dict[Problem, Schedule]
) -> Iterator[Pair]:
    space, key = SearchSpace.of(problem, target), ScheduleKey.of(problem, target)
    fitted = {other: space.fit(schedule) for other, schedule in winners.items() if other != problem}
    usable = {other: s for other, s in fitted.items() if space.is_valid(s)}
    own, default = winners[problem], default_schedule(problem, target)
    contenders = list(dict.fromkeys([own, default, *usable.values()]))
    times = Timer(problem, target, device).times(contenders, FINAL_ROUNDS)
    losses = {s: quantile([a / b for a, b in zip(t, times[own], strict=True)], 0.5) - 1 for s, t in times.items()}
    for other, schedule in usable.items():
        distance = key.distance(ScheduleKey.of(other, target))
        yield Pair(distance=distance, loss=losses[schedule], default_loss=losses[default])


def binned(pairs: list[Pair]) -> list[dict[str, Any]]:
    bins = []
    for low, high in itertools.pairwise((0.0, *BINS)):
        inside = [pair for pair in pairs if low < pair.distance <= high]
        if not inside:
            continue
        losses = [pair.loss for pair in inside]
        bins.append(
            {
                "up_to": high,
                "pairs": len(inside),
                # A neighbour's schedule that happens to beat a shape's own loses nothing.
                "mean": round(max(0.0, sum(losses) / len(losses)), 4),
                "p90": round(max(0.0, quantile(losses, 0.9)), 4),
                "default_mean": round(max(0.0, sum(pair.default_loss for pair in inside) / len(inside)), 4),
            }
        )
    bins[-1]["up_to"] = max(pair.distance for pair in pairs)  # nothing is known beyond
    return bins


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--sample", type=int, default=32, help="schedules that are tried for each shape")
    parser.add_argument("--write", action="store_true", help=f"keep the table in {REGRET_FILE.name} of the package")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    target = Target.of(device)
    start, pairs, num_shapes = time.monotonic(), [], 0
    for op in arguments.ops:
        winners = {}
        for problem in shapes(target, op):
            winners[problem] = winner_of(problem, target, device, arguments.sample)
            print(f"{time.monotonic() - start:4.0f} s  {problem.describe()}: {winners[problem]}", file=sys.stderr)
        for problem in winners:
            pairs += pairs_of(problem, target, device, winners)
        num_shapes += len(winners)
    bins = binned(pairs)
    print(f"\n{num_shapes} shapes, {len(pairs)} pairs on {target.name}, {target.num_cores} cores")
    print("distance up to   pairs   mean loss    p90   default's mean loss")
    for entry in bins:
        print("{up_to:14g} {pairs:7} {mean:11.1%} {p90:6.1%} {default_mean:13.1%}".format(**entry))
    if arguments.write:
        tables = json.loads(REGRET_FILE.read_text()) if REGRET_FILE.exists() else {}
        tables[target.kind] = {
            "device": f"{target.name}, {target.num_cores} cores",
            "command": f"python benchmarks/regret.py {' '.join(sys.argv[1:])}",
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": installed_versions(),
            "shapes": num_shapes,
            "bins": bins,
        }
        REGRET_FILE.write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
