"""Records and caches to test with: made by hand, nothing is measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hsa_compile.problem import Problem
from hsa_compile.schedules.cache import ScheduleCache
from hsa_compile.schedules.record import Measurement, TuningRecord
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import default_schedule
from hsa_compile.target import Target

MakeProblem = Callable[..., Problem]
MakeRecord = Callable[..., TuningRecord]


@pytest.fixture
def cpu() -> Target:
    return Target(kind="cpu", name="Test CPU", arch="avx2", num_cores=4)


@pytest.fixture
def gpu() -> Target:
    return Target(kind="cuda", name="Test GPU", arch="sm_90", num_cores=132, shared_memory=232448, warp_size=32)


@pytest.fixture
def make_problem() -> MakeProblem:
    def make(**fields: Any) -> Problem:
        shape = {"seq_len": 4096, "num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "top_k": 8, "dtype": "bfloat16"}
        return Problem(**{**shape, **fields})

    return make


@pytest.fixture
def make_record(cpu: Target, make_problem: MakeProblem) -> MakeRecord:
    def make(
        problem: Problem | None = None,
        target: Target = cpu,
        schedule: Schedule | None = None,
        *,
        median_ms: float = 1.25,
        torch: str = "2.13.0",
        kind: str = "measured",
        kernel_source: str | None = None,
        date: str = "2026-02-03T04:05:06+00:00",
        **fields: Any,
    ) -> TuningRecord:
        problem = problem or make_problem(**fields)
        measurement = Measurement(median_ms=median_ms, p20_ms=median_ms, p80_ms=median_ms, repeats=15)
        return TuningRecord(
            problem=problem,
            target=target,
            schedule=schedule or default_schedule(problem, target),
            measurement=measurement if kind == "measured" else Measurement.predicted(median_ms),
            default_measurement=Measurement(median_ms=2.5, p20_ms=2.25, p80_ms=2.75, repeats=15),
            trials=12,
            failures={"WrongResult": 1},
            inputs="random",
            fingerprint="0123456789abcdef",
            versions={"torch": torch, "triton": "3.6.0", "optuna": "5.0.0", "hsa-compile": "0.1.0"},
            date=date,
            kind=kind,
            kernel_source=kernel_source,
        )

    return make


@pytest.fixture
def open_cache(tmp_path: Path) -> Callable[..., ScheduleCache]:
    """A cache as a new process would read it: the user's files in `tmp_path / user`, nothing pretuned."""

    def open_(user: str = "user", pretuned: str = "pretuned") -> ScheduleCache:
        return ScheduleCache(tmp_path / user, pretuned=tmp_path / pretuned)

    return open_
