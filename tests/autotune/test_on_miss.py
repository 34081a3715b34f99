"""Tuning on a miss is asked for, happens once, and what it stores is what runs."""

from collections.abc import Iterator
from typing import Any

import pytest

import hsa_compile
from hsa_compile.autotune.options import TuneOptions
from hsa_compile.autotune.tune import set_autotune, tune
from hsa_compile.errors import InvalidArgument
from hsa_compile.problem import Problem
from hsa_compile.schedules.record import TuningRecord
from hsa_compile.target import Target

PROBLEM = Problem(seq_len=131, num_heads=4, num_kv_heads=1, head_dim=16, chunk_size=16, top_k=2)


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[TuningRecord]]:
    """Records of the searches that a miss began, which are short and in this process here."""
    records: list[TuningRecord] = []

    def short(problem: Problem, target: Target, options: TuneOptions, **more: Any) -> TuningRecord:
        records.append(tune(problem, target, options, trials=5, timeout=600.0, isolate=False, **more))
        return records[-1]

    monkeypatch.setattr("hsa_compile.autotune.tune.tune", short)
    yield records
    set_autotune("off")


@pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")
def test_a_miss_is_tuned_once_if_that_was_asked_for(
    tuned: list[TuningRecord], capsys: pytest.CaptureFixture[str]
) -> None:
    target = Target.parse("cpu")
    hsa_compile.resolve(PROBLEM, target)
    assert tuned == []
    hsa_compile.set_autotune("on-miss")
    kernel = hsa_compile.resolve(PROBLEM, target)
    assert [record.problem for record in tuned] == [PROBLEM]
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        f"hsa-compile: tuning {PROBLEM.describe()} on {target.name}, once, for at most 55 s; "
        "hsa_compile.set_autotune('off') runs a default schedule at once\n"
    )
    assert kernel.source.schedule == tuned[0].schedule
    hsa_compile.resolve(PROBLEM, target)
    assert len(tuned) == 1
    hsa_compile.set_autotune("off")
    hsa_compile.resolve(PROBLEM.with_op("hsa_backward"), target)
    assert len(tuned) == 1


def test_an_unknown_mode_is_refused_with_those_that_exist() -> None:
    with pytest.raises(InvalidArgument, match="autotune = 'always' is not one of off, on-miss"):
        set_autotune("always")
    with pytest.raises(InvalidArgument, match="timeout = -1 must be more than 0 seconds"):
        set_autotune("on-miss", timeout=-1)
