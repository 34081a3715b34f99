"""Do ten tunes of one problem agree? Each starts from scratch with a seed of its own; no schedule is stored.

    python benchmarks/ten_tunes.py                                  # the default problem's forward pass, on the CPU
    python benchmarks/ten_tunes.py --op hsa_backward --json OUT.json

A tune agrees with another if its winner is the other's, or in the other's tie-set: its play-off could not tell the two
apart. Counted are those that agree with the tune that most agree with. For a quiet machine.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from hsa_compile import Problem, Target
from hsa_compile.autotune.options import DEFAULT_TIMEOUT_S, DEFAULT_TRIALS
from hsa_compile.autotune.tune import tune
from hsa_compile.cli.options import expand
from hsa_compile.problem import OPS
from hsa_compile.schedules.record import TuningRecord
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.versions import installed_versions


def agreement(records: Sequence[TuningRecord]) -> tuple[Schedule, int]:
    """The winner that most tunes agree with, and how many, itself included."""
    counts = [sum(other.schedule in (record.schedule, *record.tie_set) for other in records) for record in records]
    return records[counts.index(max(counts))].schedule, max(counts)


def to_json(problem: Problem, records: Sequence[TuningRecord], trials: int) -> str:
    """Every tune's winner, tie-set and verdict, and the count."""
    winner, count = agreement(records)
    tunes = [
        {
            "seed": seed,
            "winner": str(record.schedule),
            "median_ms": round(record.measurement.median_ms, 3),
            "speedup": round(record.speedup, 3),
            "trials": record.trials,
            "tie_set": [str(schedule) for schedule in record.tie_set],
            "verdict": record.verdict,
        }
        for seed, record in enumerate(records)
    ]
    target = records[0].target
    about = {
        "problem": problem.describe(),
        "device": f"{target.name}, {target.num_cores} cores",
        "trials": trials,
        "versions": installed_versions(),
    }
    return json.dumps({**about, "agree": count, "of": len(records), "on": str(winner), "tunes": tunes}, indent=1)


def main() -> None:
    """Parses the command line, tunes, prints, writes what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=OPS, default=OPS[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seq-len", type=int, help="of the default problem, if not its own")
    parser.add_argument("--tunes", type=int, default=10)
    parser.add_argument("--trials", type=int, default=DEFAULT_TRIALS)
    parser.add_argument("--timeout", type=float, default=DEFAULT_TIMEOUT_S, help="seconds for each tune")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    chosen = {"seq_len": (given.seq_len,)} if given.seq_len else {}
    problem = expand(Target.of(torch.device(given.device)), chosen, (given.op,))[0]
    records = []
    with tempfile.TemporaryDirectory() as empty:
        os.environ["HSA_COMPILE_CACHE_DIR"] = empty  # no winner of an earlier tune is a warm start
        for seed in range(given.tunes):
            record = tune(problem, device=given.device, seed=seed, trials=given.trials, timeout=given.timeout)
            records.append(record)
            ties = f", {len(record.tie_set)} in the tie-set" if len(record.tie_set) > 1 else ""
            print(f"seed {seed}: {record.schedule}, {record.trials} trials{ties}", file=sys.stderr, flush=True)
    winner, count = agreement(records)
    print(f"{problem.describe()}: {count} of {len(records)} tunes agree on {winner} or one of its ties")
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(to_json(problem, records, given.trials) + "\n")


if __name__ == "__main__":
    main()
