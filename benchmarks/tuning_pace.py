"""How many candidates a minute a search on a GPU compiles and times, with the GPU and its compilers simulated:

    python benchmarks/tuning_pace.py                       # 60 seconds, 16 compilers, forward in bfloat16 on an H100
    python benchmarks/tuning_pace.py --compilers 4 --seconds 30

The study, its sampler, storage and ledger are a search's own; what the compilers and the GPU do are sleeps as long as
was measured on an H100 with 16 cores. To compile takes 1.5 s in the median and 3.6 at the 90th percentile; a kernel
takes 10.8 ms at best, 19.7 in the median and 13.6 with the default, on each of two distributions. What it takes to load
and check a kernel, 0.1 s, is a guess.
"""

import argparse
import contextlib
import math
import os
import random
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hsa_compile import Problem
from hsa_compile.autotune.bench.isolation import CompilePool
from hsa_compile.autotune.cost.roofline import Resources
from hsa_compile.autotune.options import TuneOptions
from hsa_compile.autotune.search import SearchResult
from hsa_compile.autotune.session import Session
from hsa_compile.errors import OutOfResources
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import PRODUCTS

COMPILE_S, COMPILE_P90_S = 1.5, 3.6
KERNEL_MS, BEST_MS, DEFAULT_MS = 19.7, 10.8, 13.6
CHECK_S = 0.1
NO_ROOM = 12 / 213  # the share of candidates that do not fit in shared memory, which only the compiler knows
_P90 = 1.2816  # standard deviations from the median of a normal distribution


class Compiler:
    """Sleeps as long as a candidate takes to compile, and counts."""

    lock = threading.Lock()
    compiled = 0

    def compile(self, schedule: Schedule) -> Resources:
        draws = random.Random(f"compile {schedule}")
        time.sleep(COMPILE_S * math.exp(draws.gauss(0, math.log(COMPILE_P90_S / COMPILE_S) / _P90)))
        with Compiler.lock:
            Compiler.compiled += 1
        if draws.random() < NO_ROOM:
            raise OutOfResources("shared memory")
        return Resources()

    def close(self) -> None: ...


class Gpu:
    """A bench on which a kernel is a sleep, with a time that depends on the schedule alone."""

    def __init__(self, default: Schedule) -> None:
        self._default = default

    def compile(self, schedule: Schedule) -> Resources:
        raise AssertionError("the pool compiles")

    def prepare(self, schedule: Schedule) -> str:
        time.sleep(CHECK_S + 2 * self.ms(schedule) / 1e3)
        return str(schedule)

    def time(self, schedules: Sequence[Schedule], rounds: int, inputs: str | None = None) -> list[list[float]]:
        times = [[self.ms(schedule)] * rounds for schedule in schedules]
        time.sleep(sum(map(sum, times)) / 1e3)
        return times

    def ms(self, schedule: Schedule) -> float:
        """Milliseconds of a kernel: above the best, drawn by the schedule's name."""
        if schedule == self._default:
            return DEFAULT_MS
        return BEST_MS + random.Random(f"time {schedule}").expovariate(math.log(2) / (KERNEL_MS - BEST_MS))


class SimulatedSession(Session):
    """A session of a search whose bench and compilers only sleep."""

    num_compilers = 16

    def _make_benches(self) -> list[Any]:
        return [contextlib.nullcontext(Gpu(self.first[0]))]

    def _make_pool(self, opening: Any) -> CompilePool:
        return opening.enter_context(CompilePool([Compiler() for _ in range(self.num_compilers)]))


def main() -> None:
    """Parses the command line, searches and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compilers", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument(
        "--inputs", help="distributions, ` and ` between them; by default those of a GPU, which are two"
    )
    given = parser.parse_args()
    SimulatedSession.num_compilers = given.compilers
    problem = Problem(seq_len=65536, num_heads=16, num_kv_heads=1, head_dim=128, top_k=16, dtype="bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HSA_COMPILE_CACHE_DIR"] = folder
        options = TuneOptions(
            trials=100_000,
            distribution=given.inputs,
            timeout=given.seconds,
            storage=f"{folder}/study.journal",
            ledger=Path(folder, "ledger.jsonl"),
        )
        with SimulatedSession(problem, PRODUCTS["h100"], ["cuda:0"], options) as session:
            start, processor = time.monotonic(), time.process_time()
            result: SearchResult = session.run(start + given.seconds, lambda: False, lambda result: None)
            minutes = (time.monotonic() - start) / 60
            processor = time.process_time() - processor
            compiled = Compiler.compiled
    print(
        f"{given.compilers} compilers, {minutes * 60:.0f} s: {compiled / minutes:.0f} compiled and "
        f"{len(result.trials) / minutes:.0f} timed a minute; the search itself took {processor:.1f} s of a core"
    )


if __name__ == "__main__":
    main()
