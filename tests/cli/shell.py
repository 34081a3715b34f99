"""Commands run as a person runs them: exit code, standard output, standard error."""

import json
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from hsa_compile.cli.main import main
from hsa_compile.problem import Problem
from hsa_compile.schedules import cache as cache_module
from hsa_compile.schedules.record import Measurement, TuningRecord
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import Target

# A tiny problem, and the flags that ask for it.
FIELDS = {"seq_len": 128, "num_heads": 4, "num_kv_heads": 1, "head_dim": 16, "chunk_size": 16, "top_k": 2}
SHAPE = [
    word for name, value in FIELDS.items() for word in (f"--{name.removeprefix('num_').replace('_', '-')}", str(value))
]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Shell:
    """Runs commands in this process, each with the cache read anew, as a process of its own would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> Outcome:
        cache_module._cache_of.cache_clear()
        self.monkeypatch.setattr(sys, "argv", ["hsa-compile", *arguments])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = self.capsys.readouterr()
        assert isinstance(exit_.value.code, int)
        return Outcome(exit_.value.code, captured.out, captured.err)


def record_of(op: str) -> TuningRecord:
    """What a tuning of the tiny problem might have found."""
    problem, target = Problem(op=op, **FIELDS), Target.parse("cpu")
    return TuningRecord(
        problem=problem,
        target=target,
        schedule=Schedule.of("token", block_tokens=4),
        measurement=Measurement(median_ms=1.0, p20_ms=1.0, p80_ms=1.0, repeats=15),
        default_measurement=Measurement(median_ms=2.0, p20_ms=2.0, p80_ms=2.0, repeats=15),
        trials=12,
        failures={},
        inputs="random",
        fingerprint="0123456789abcdef",
        versions={"torch": "2.13.0"},
        date="2026-02-03T04:05:06+00:00",
    )
