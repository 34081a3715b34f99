"""What a tuning run found out: a schedule with its measurement, and everything needed to judge it later."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from hsa_compile.errors import InvalidArgument
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Wall times of one kernel in milliseconds.

    Attributes:
        median_ms, p20_ms, p80_ms: over the repetitions.
        repeats: how many there were.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int

    def __post_init__(self) -> None:
        for name in ("median_ms", "p20_ms", "p80_ms"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
                raise InvalidArgument(f"{name} = {value!r} must be a positive number of milliseconds")
        if not isinstance(self.repeats, int) or self.repeats < 1:
            raise InvalidArgument(f"repeats = {self.repeats!r} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningRecord:
    """The winner of one search, as the cache keeps it.

    Attributes:
        problem, target, schedule: what was tuned, where, and what won.
        measurement: of the winner in the final play-off.
        default_measurement: of the default schedule in the same play-off, interleaved with it.
        trials: candidates that were tried.
        failures: how many of them failed, by the name of the error.
        inputs: name of the input distribution.
        fingerprint: of the emitted source that was measured.
        versions: of torch, triton, optuna and hsa-compile.
        date: ISO 8601, UTC.
    """

    problem: Problem
    target: Target
    schedule: Schedule
    measurement: Measurement
    default_measurement: Measurement
    trials: int
    failures: Mapping[str, int]
    inputs: str
    fingerprint: str
    versions: Mapping[str, str]
    date: str

    @property
    def speedup(self) -> float:
        """Time of the default schedule over time of this one."""
        return self.default_measurement.median_ms / self.measurement.median_ms

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "problem": self.problem.to_dict(),
            "target": self.target.to_dict(),
            "schedule": dict(self.schedule),
            "measurement": asdict(self.measurement),
            "default_measurement": asdict(self.default_measurement),
            "trials": self.trials,
            "failures": dict(self.failures),
            "inputs": self.inputs,
            "fingerprint": self.fingerprint,
            "versions": dict(self.versions),
            "date": self.date,
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "TuningRecord":
        """The record that `to_dict` wrote.

        Raises:
            InvalidArgument, KeyError, TypeError: a field is missing, unknown or out of range.
        """
        return TuningRecord(
            problem=_build(Problem, values["problem"]),
            target=_build(Target, values["target"]),
            schedule=Schedule.from_dict(values["schedule"]),
            measurement=_build(Measurement, values["measurement"]),
            default_measurement=_build(Measurement, values["default_measurement"]),
            trials=int(values["trials"]),
            failures={str(name): int(count) for name, count in values["failures"].items()},
            inputs=str(values["inputs"]),
            fingerprint=str(values["fingerprint"]),
            versions={str(name): str(version) for name, version in values["versions"].items()},
            date=str(values["date"]),
        )


def _build(cls: type, values: Any) -> Any:
    if not isinstance(values, Mapping):
        raise InvalidArgument(f"{cls.__name__} is {values!r}, not a mapping")
    known = {field.name for field in fields(cls)}
    if unknown := set(values) - known:
        raise InvalidArgument(f"{cls.__name__} has unknown fields {', '.join(sorted(unknown))}")
    return cls(**values)
