"""The record of one search: the schedule that won, its measurement, and everything needed to judge it later."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hsa_compile.checks import (
    check_choice,
    check_count,
    check_flag,
    check_number,
    check_text,
    check_texts,
    from_mapping,
    shown,
)
from hsa_compile.errors import InvalidArgument, may_pass
from hsa_compile.markup import facts_table
from hsa_compile.problem import Problem
from hsa_compile.schedules.ops import source_version
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.target import Target

MEASURED, PREDICTED = "measured", "predicted"
KINDS = (MEASURED, PREDICTED)
MIN_MS, MAX_MS = 1e-9, 1e12
MAX_COUNT = 2**40
MAX_CLOCK_MHZ = 10**6
MIN_TIMED = 5  # a search that timed fewer candidates, the default included, has found out nothing worth keeping


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Wall times of one kernel in milliseconds.

    Attributes:
        median_ms, p20_ms, p80_ms: the median and the 20th and 80th percentiles of the repetitions.
        repeats: how many there were; 0 if the time was predicted, not measured.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int

    def __post_init__(self) -> None:
        for name in ("median_ms", "p20_ms", "p80_ms"):
            check_number(name, getattr(self, name), MIN_MS, MAX_MS)
        check_count("repeats", self.repeats, 0, MAX_COUNT)

    @staticmethod
    def predicted(time_ms: float) -> "Measurement":
        """Returns a time that a model gave, as a measurement without repetitions."""
        return Measurement(median_ms=time_ms, p20_ms=time_ms, p80_ms=time_ms, repeats=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningRecord:
    """The winner of one search, as the cache keeps it.

    Attributes:
        problem, target, schedule: what was tuned, where, and what won.
        measurement: the winner's times in the final play-off, or what the model predicts for it.
        default_measurement: the default schedule's times in the same play-off, interleaved with the winner's.
        trials: how many candidates were tried.
        failures: how many of them failed, by the name of the error.
        inputs: how the picks of the inputs fell: a distribution, several with ` and ` between them, or a file of picks.
        by_inputs: where there were several, each one's name with the winner's and the default's times on it; the
            times above are their geometric means.
        fingerprint: the digest of the emitted source that was measured.
        versions: the versions of torch, triton, optuna and hsa-compile, and of a GPU's driver.
        date: when the search ended, in ISO 8601, UTC.
        kind: `measured` on the device, or `predicted` for one that was not there.
        kernel_source: the digest of the templates that the kernel was emitted from; those of this package if None.
        verdict: what the play-off decided, in words.
        tie_set: the schedules that the play-off cannot tell from the winner, which is the first; any of them would do.
        confidence: how sure the play-off is that the winner beats the default, and all that are not in the tie-set.
        clocks_mhz: the clocks of a GPU's multiprocessors and memory while it was timed, where they are known.
        complete: whether the search came to its end and did not fail with most candidates for reasons that may pass
            (`failed_in_passing`); one that is not complete goes on when it is asked for again.
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
    kind: str = MEASURED
    kernel_source: str | None = None
    verdict: str = ""
    tie_set: tuple[Schedule, ...] = ()
    confidence: float | None = None
    clocks_mhz: Mapping[str, int] | None = None
    complete: bool = True
    by_inputs: Mapping[str, tuple[Measurement, Measurement]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        if (self.measurement.repeats == 0) != (self.kind == PREDICTED):
            raise InvalidArgument(f"a {self.kind} record has a time from {self.measurement.repeats} repeats")
        if self.kernel_source is None:
            object.__setattr__(self, "kernel_source", source_version(self.problem, self.target))
        check_count("trials", self.trials, 0, MAX_COUNT)
        for name in ("inputs", "fingerprint", "date", "kernel_source", "verdict"):
            check_text(name, getattr(self, name))
        check_texts("versions", self.versions)
        self._check_counts("failures", self.failures, MAX_COUNT)
        if self.clocks_mhz is not None:
            self._check_counts("clocks_mhz", self.clocks_mhz, MAX_CLOCK_MHZ)
        if self.confidence is not None:
            check_number("confidence", self.confidence, 0, 1)
        check_flag("complete", self.complete)
        for name in self.by_inputs:
            check_text("a name in by_inputs", name)

    @staticmethod
    def _check_counts(field: str, counts: Mapping[str, int], most: int) -> None:
        if not isinstance(counts, Mapping):
            raise InvalidArgument(f"{field} = {shown(counts)} must be a mapping of names to integers")
        for name, count in counts.items():
            check_text(f"a name in {field}", name)
            check_count(f"{field} of {name}", count, 0, most)

    @property
    def speedup(self) -> float:
        """The time of the default schedule divided by the time of this one."""
        return self.default_measurement.median_ms / self.measurement.median_ms

    @property
    def is_default(self) -> bool:
        """Whether the default schedule won: then the two measurements are the same."""
        return self.measurement == self.default_measurement

    @property
    def timed(self) -> int:
        """How many candidates were timed."""
        return self.trials - sum(self.failures.values())

    @property
    def tried_all(self) -> bool:
        """Whether the search tried every candidate that there is, and most did not fail for a reason that may pass."""
        tried = self.trials >= _num_candidates(self.problem, self.target)
        return tried and not failed_in_passing(self.failures, self.trials)

    @property
    def shortfall(self) -> str | None:
        """Why the search was too small for its winner to be kept, or None if it was not.

        It was if fewer than `MIN_TIMED` candidates were timed although there are more.
        """
        if self.kind == PREDICTED or self.timed >= MIN_TIMED or self.tried_all:
            return None
        count, were = _num_candidates(self.problem, self.target), "was" if self.timed == 1 else "were"
        return f"only {self.timed} of {count} candidates {were} timed, {MIN_TIMED} are needed"

    def outdated(self, now: Mapping[str, str]) -> str:
        """Says under which other compiler the schedule was timed: empty, or such as `torch 2.6.0, triton 3.5.0`.

        Another minor version of PyTorch or Triton, or another major one of the driver, can halve a kernel's speed; a
        kernel in C++ or PyTorch does not depend on the last two.

        Args:
            now: the versions that are installed, as `versions.installed_versions` gives them.
        """
        parts = {"torch": 2} if self.target.kind == "cpu" else {"torch": 2, "triton": 2, "driver": 1}
        before = {name: version for name, version in self.versions.items() if name in parts and name in now}
        return ", ".join(
            f"{name} {version}"
            for name, version in before.items()
            if version.split(".")[: parts[name]] != now[name].split(".")[: parts[name]]
        )

    def _repr_html_(self) -> str:
        """Returns a table of what a person asks first, for a notebook."""
        facts = {
            "device": self.target.name,
            "schedule": str(self.schedule),
            "time": f"{self.measurement.median_ms:.3g} ms ({self.kind})",
            "default": f"{self.default_measurement.median_ms:.3g} ms",
            "gain": f"{self.speedup:.2f}x",
            "candidates": f"{self.trials} tried, {sum(self.failures.values())} failed",
            "verdict": self.verdict or "none",
        }
        return facts_table(facts, caption=self.problem.in_words())

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, ready for JSON."""
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
            "kind": self.kind,
            "kernel_source": self.kernel_source,
            "verdict": self.verdict,
            "tie_set": [dict(schedule) for schedule in self.tie_set],
            "confidence": self.confidence,
            "clocks_mhz": None if self.clocks_mhz is None else dict(self.clocks_mhz),
            "complete": self.complete,
            "by_inputs": {
                name: {"measurement": asdict(own), "default_measurement": asdict(default)}
                for name, (own, default) in self.by_inputs.items()
            },
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "TuningRecord":
        """Returns the record that `to_dict` wrote.

        Raises:
            InvalidArgument, KeyError, TypeError: a field is missing, unknown or out of range.
        """
        return TuningRecord(
            problem=from_mapping(Problem, values["problem"]),
            target=from_mapping(Target, values["target"]),
            schedule=Schedule.from_dict(values["schedule"]),
            measurement=from_mapping(Measurement, values["measurement"]),
            default_measurement=from_mapping(Measurement, values["default_measurement"]),
            trials=values["trials"],
            failures=values["failures"],
            inputs=values["inputs"],
            fingerprint=values["fingerprint"],
            versions=values["versions"],
            date=values["date"],
            # Older files lack the fields from here on; what their kernels were emitted from is not known.
            kind=values.get("kind", MEASURED),
            kernel_source=values.get("kernel_source") or "",
            verdict=values.get("verdict", ""),
            tie_set=tuple(map(Schedule.from_dict, values.get("tie_set", ()))),
            confidence=values.get("confidence"),
            clocks_mhz=values.get("clocks_mhz"),
            complete=values.get("complete", True),
            by_inputs=_pairs(values.get("by_inputs", {})),
        )


def num_passing(failures: Mapping[str, int]) -> int:
    """Counts the failures that another day may not repeat (`errors.may_pass`), from how many there are by name."""
    return sum(count for name, count in failures.items() if may_pass(name))


def failed_in_passing(failures: Mapping[str, int], trials: int) -> bool:
    """Returns whether most of the candidates that were tried failed for a reason that may pass."""
    return 2 * num_passing(failures) > trials


def _pairs(values: object) -> dict[str, tuple[Measurement, Measurement]]:
    """Returns the winner's and the default's times by the name of the inputs, from the form of `to_dict`."""
    if not isinstance(values, Mapping) or not all(isinstance(pair, Mapping) for pair in values.values()):
        raise InvalidArgument(f"by_inputs = {shown(values)} must be a mapping of names to pairs of measurements")
    return {
        name: (
            from_mapping(Measurement, pair["measurement"]),
            from_mapping(Measurement, pair["default_measurement"]),
        )
        for name, pair in values.items()
    }


def _num_candidates(problem: Problem, target: Target) -> int:
    return sum(1 for _ in SearchSpace.of(problem, target).schedules())
