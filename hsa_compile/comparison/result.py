"""What came of one contender on one case, and all of them as a file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hsa_compile.comparison.contender import CLAIMS
from hsa_compile.comparison.peaks import Peaks
from hsa_compile.errors import InvalidArgument, SaveError
from hsa_compile.problem import Problem
from hsa_compile.schedules.record import Measurement

TIMED, WRONG, FAILED, LEFT_OUT = "timed", "wrong", "failed", "left out"
STATUSES = (TIMED, WRONG, FAILED, LEFT_OUT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One row.

    Attributes:
        kind, problem: of the case.
        contender, computes: its name and its claim.
        status: `timed`, `wrong` (its check failed), `failed` (it raised an error) or `left out`.
        note: why it was not timed; of ours, which schedules ran.
        measurement: its times; None unless timed.
        ratio: its time over ours, the median over rounds, with p20 and p80; None where either was not timed.
        tflops, gb_s: achieved, by the least that has to be computed and moved.
    """

    kind: str
    problem: Problem
    contender: str
    computes: str
    status: str
    note: str = ""
    measurement: Measurement | None = None
    ratio: tuple[float, float, float] | None = None
    tflops: float | None = None
    gb_s: float | None = None

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise InvalidArgument(f"status = {self.status!r} is not one of {', '.join(STATUSES)}")
        if self.computes not in CLAIMS:
            raise InvalidArgument(f"computes = {self.computes!r} is not one of {', '.join(CLAIMS)}")
        if (self.status == TIMED) != (self.measurement is not None):
            raise InvalidArgument(f"a result that is {self.status} has the measurement {self.measurement}")

    @property
    def bad(self) -> bool:
        """Whether it disproves what it claims: no figure of it may be shown."""
        return self.status in (WRONG, FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All rows of a run, and what they depend on.

    Attributes:
        device: name, architecture and number of cores.
        command, date, versions: how, when and with what it was run.
        inputs: name of the distribution of picks.
        peaks: of the device, by dtype.
        results: rows, in the order of the table.
    """

    device: str
    command: str
    date: str
    versions: Mapping[str, str]
    inputs: str
    peaks: Mapping[str, Peaks | None]
    results: Sequence[Result]

    def to_json(self) -> str:
        """All of it as indented JSON."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str) -> "Comparison":
        """What `to_json` gave.

        Raises:
            InvalidArgument: it is something else.
        """
        try:
            fields = json.loads(text)
            peaks = {name: Peaks(**value) if value else None for name, value in fields["peaks"].items()}
            return Comparison(**{**fields, "peaks": peaks, "results": [_result(row) for row in fields["results"]]})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidArgument(f"this is no comparison as JSON: {type(error).__name__} {error}") from error

    def write(self, path: Path) -> None:
        """As a JSON file.

        Raises:
            SaveError: it cannot be written.
        """
        try:
            path.write_text(self.to_json(), encoding="utf-8")
        except OSError as error:
            raise SaveError(f"{path} cannot be written: {error.strerror or error}") from error


def _result(row: dict[str, Any]) -> Result:
    return Result(
        **{
            **row,
            "problem": Problem(**row["problem"]),
            "measurement": Measurement(**row["measurement"]) if row["measurement"] else None,
            "ratio": tuple(row["ratio"]) if row["ratio"] else None,
        }
    )
