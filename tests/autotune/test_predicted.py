"""Schedules for GPUs that are not here, in processes of their own, since this one interprets Triton kernels."""

import json
import os
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest

from hsa_compile.autotune.cost import predict_schedule as predicted
from hsa_compile.autotune.cost.predict_schedule import MAX_CANDIDATES, predict_schedule, ranked_candidates
from hsa_compile.errors import CompileError, InvalidArgument, InvalidTarget, OutOfResources
from hsa_compile.kernels.ahead_of_time import KernelResources
from hsa_compile.problem import OPS, Problem
from hsa_compile.schedules.record import PREDICTED, TuningRecord
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import default_schedule
from hsa_compile.target import NAMED_TARGETS, PRODUCTS, Target

pytest.importorskip("triton")
PROBLEM = Problem(seq_len=2048, num_heads=8, num_kv_heads=2, head_dim=64, chunk_size=32, top_k=4, dtype="bfloat16")

PREDICT = """
import json, sys
from hsa_compile.autotune.cost.predict_schedule import predict_schedule
from hsa_compile.kernels.ahead_of_time import compile_launches
from hsa_compile.kernels.compile import compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.problem import Problem
from hsa_compile.target import Target

if __name__ == "__main__":
    problem, target = Problem(**json.loads(sys.argv[1])), Target.parse(sys.argv[2])
    seen = []
    record = predict_schedule(problem, target, budget_s=float(sys.argv[3]), on_progress=seen.append)
    kernels = compile_launches(compile_kernel(emit(problem, record.schedule, target)).module, target)
    print(json.dumps({
        "record": record.to_dict(),
        "spills": [kernel.spills for kernel in kernels],
        "compiled": [progress.compiled for progress in seen],
        "best": [progress.best_ms for progress in seen],
    }))
"""


@pytest.mark.parametrize(
    ("name", "op", "budget_s"),
    [
        pytest.param("h100", "hsa_forward", "0.1", marks=pytest.mark.slow),  # the default and a few
        *(pytest.param(name, op, "6", marks=pytest.mark.exhaustive) for name in ("h100", "gfx942") for op in OPS),
    ],
)
def test_the_stored_schedule_compiles_does_not_spill_and_is_no_worse_than_the_default(
    name: str, op: str, budget_s: str
) -> None:
    arguments = [json.dumps(PROBLEM.with_op(op).to_dict()), name, budget_s]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", PREDICT, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    record = TuningRecord.from_dict(result["record"])
    assert record.kind == PREDICTED
    assert record.target == Target.parse(name)
    assert record.measurement.repeats == 0
    assert record.measurement.median_ms <= record.default_measurement.median_ms
    assert set(result["spills"]) == {0}
    assert result["compiled"] == list(range(1, record.trials + 1))
    times = [time for time in result["best"] if time is not None]
    assert times == sorted(times, reverse=True)


@pytest.mark.exhaustive
def test_an_op_that_the_model_cannot_rank_keeps_its_default() -> None:
    problem = Problem(op="select_chunks", seq_len=2048, num_heads=2, num_kv_heads=2, head_dim=64, top_k=4,
                      dtype="bfloat16")  # fmt: skip
    arguments = [json.dumps(problem.to_dict()), "h100", "6"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", PREDICT, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    record = TuningRecord.from_dict(json.loads(done.stdout)["record"])
    assert record.schedule == default_schedule(problem, PRODUCTS["h100"])
    assert record.speedup == 1.0


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("target", NAMED_TARGETS.values(), ids=lambda target: target.arch)
def test_candidates_begin_with_the_default_and_are_of_several_kinds(target: Target, op: str) -> None:
    problem = PROBLEM.with_op(op)
    candidates = ranked_candidates(problem, target)
    assert candidates[0] == default_schedule(problem, target)
    assert 20 < len(candidates) <= MAX_CANDIDATES
    assert len(set(candidates)) == len(candidates)
    assert len({(s["num_warps"], s["num_stages"]) for s in candidates[:30]}) > 1


class SpillingPool:
    """Takes the place of the compilers: whatever is no default spills, or does not fit."""

    size = 2

    def __init__(self, *_: object, **__: object) -> None:
        self.num_submitted = 0

    def __enter__(self) -> "SpillingPool":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, schedule: Schedule) -> "Future[tuple[KernelResources, ...]]":
        done: Future[tuple[KernelResources, ...]] = Future()
        self.num_submitted += 1
        if self.num_submitted == 2:
            done.set_exception(OutOfResources("too much shared memory"))
            return done
        spills = 0 if self.num_submitted == 1 else 8
        kernel = KernelResources(
            name="a kernel", registers=64, spills=spills, shared_memory=1024, num_warps=4, matrix_instruction="HGMMA"
        )
        done.set_result((kernel,))
        return done


def test_candidates_that_spill_or_do_not_fit_are_counted_and_never_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predicted, "CompilePool", SpillingPool)
    monkeypatch.setattr(predicted, "MAX_CANDIDATES", 9)
    record = predict_schedule(PROBLEM, PRODUCTS["h100"])
    assert record.schedule == default_schedule(PROBLEM, PRODUCTS["h100"])
    assert (record.trials, record.failures) == (9, {"OutOfResources": 1, "spills": 7})


def test_what_has_no_model_and_a_budget_of_nothing_are_refused() -> None:
    with pytest.raises(InvalidTarget, match="there is no model of CPUs"):
        predict_schedule(PROBLEM, Target.parse("cpu"))
    with pytest.raises(InvalidArgument, match="budget_s = 0 must be more than 0"):
        predict_schedule(PROBLEM, PRODUCTS["h100"], budget_s=0)


@pytest.mark.slow
def test_a_process_that_interprets_kernels_says_that_it_cannot_compile(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="TRITON_INTERPRET"):
        predict_schedule(PROBLEM, PRODUCTS["h100"], budget_s=1)
