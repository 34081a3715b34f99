"""What became of one candidate: its times, or why it is out."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hsa_compile.autotune.measure import quantile
from hsa_compile.autotune.resources import Resources
from hsa_compile.errors import HSACompileError, InvalidArgument

STAGES = ("resources", "prepare", "quick", "full")  # each dearer than the one before


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A candidate that was timed, in turns with the default, or that failed.

    Attributes:
        stage: how far it came: refused for its compiled resources, failed while it was compiled or checked,
            dropped after the quick timings, or timed in full.
        times_ms, default_times_ms: of the same rounds; empty if it failed.
        failure, reason: the name of the error and its message; empty if it was timed.
        fingerprint: of its source; empty if it failed.
        resources: what it uses, where the compiler tells.
        seconds: that it took, compiling ahead not counted.
    """

    stage: str
    times_ms: tuple[float, ...] = ()
    default_times_ms: tuple[float, ...] = ()
    failure: str = ""
    reason: str = ""
    fingerprint: str = ""
    resources: Resources | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise InvalidArgument(f"stage = {self.stage!r} is not one of {', '.join(STAGES)}")
        if bool(self.failure) == bool(self.times_ms) or len(self.times_ms) != len(self.default_times_ms):
            raise InvalidArgument(
                f"an outcome has a failure or pairs of times, not {self.failure!r} with {len(self.times_ms)} times "
                f"and {len(self.default_times_ms)} of the default"
            )
        if not all(math.isfinite(t) and t > 0 for t in (*self.times_ms, *self.default_times_ms)):
            raise InvalidArgument(f"times {[*self.times_ms, *self.default_times_ms]} must be positive milliseconds")

    @property
    def ratio(self) -> float | None:
        """Median of its time over the default's in the same round; None if it failed.

        Ratios to the same default compare across runs, days and drift, which times do not.
        """
        if self.failure:
            return None
        return quantile([t / d for t, d in zip(self.times_ms, self.default_times_ms, strict=True)], 0.5)

    @property
    def median_ms(self) -> float | None:
        """Its own median; None if it failed."""
        return None if self.failure else quantile(self.times_ms, 0.5)

    @staticmethod
    def failed(
        stage: str, error: HSACompileError, resources: Resources | None = None, seconds: float = 0.0
    ) -> "Outcome":
        """A candidate that is out."""
        return Outcome(
            stage=stage, failure=type(error).__name__, reason=str(error)[:500], resources=resources, seconds=seconds
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Outcome":
        """The outcome that `to_dict` gave.

        Raises:
            InvalidArgument, KeyError, TypeError: a field is missing, unknown or out of range.
        """
        resources = values["resources"]
        times = {name: tuple(values[name]) for name in ("times_ms", "default_times_ms")}
        return Outcome(**{**values, **times, "resources": None if resources is None else Resources(**resources)})
