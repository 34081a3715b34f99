"""What came of one contender on one case, all of them as a file, and the rows and notes that are shown of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hsa_compile.checks import check_choice
from hsa_compile.comparison.choices import BOTH, DECODE, FORWARD, SELECT
from hsa_compile.comparison.contender import CLAIMS
from hsa_compile.comparison.peaks import Peaks
from hsa_compile.errors import InvalidArgument, SaveError
from hsa_compile.problem import Problem
from hsa_compile.schedules.record import Measurement

TIMED, WRONG, FAILED, LEFT_OUT = "timed", "wrong", "failed", "left out"
STATUSES = (TIMED, WRONG, FAILED, LEFT_OUT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of one contender on one case.

    Attributes:
        kind, problem: what the case is.
        contender, computes: the contender's name and its claim.
        status: `timed`, `wrong` (its check failed), `failed` (it raised an error) or `left out`.
        note: why it was not timed; for ours, which schedules ran.
        measurement: its times; None unless timed.
        ratio: its time over ours, the median over rounds, with p20 and p80; None where either was not timed.
        tflops, gb_s: the rates achieved, by the least that has to be computed and moved.
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
        check_choice("status", self.status, STATUSES)
        check_choice("computes", self.computes, CLAIMS)
        if (self.status == TIMED) != (self.measurement is not None):
            raise InvalidArgument(f"a result that is {self.status} has the measurement {self.measurement}")

    @property
    def bad(self) -> bool:
        """Whether it disproves what it claims, so that no figure of it may be shown."""
        return self.status in (WRONG, FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All rows of a run, and what they depend on.

    Attributes:
        device: name, architecture and number of cores.
        command, date, versions: how, when and with what it was run.
        inputs: the name of the distribution of picks.
        peaks: the peaks of the device, by dtype.
        results: the rows, in the order of the table.
    """

    device: str
    command: str
    date: str
    versions: Mapping[str, str]
    inputs: str
    peaks: Mapping[str, Peaks | None]
    results: Sequence[Result]

    def to_json(self) -> str:
        """Returns all of it as indented JSON."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str) -> "Comparison":
        """Reads what `to_json` gave.

        Raises:
            InvalidArgument: the text is something else.
        """
        try:
            fields = json.loads(text)
            peaks = {name: Peaks(**value) if value else None for name, value in fields["peaks"].items()}
            return Comparison(**{**fields, "peaks": peaks, "results": [_result(row) for row in fields["results"]]})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidArgument(f"this is no comparison as JSON: {type(error).__name__} {error}") from error

    def write(self, path: Path) -> None:
        """Writes all of it as a JSON file.

        Raises:
            SaveError: the file cannot be written.
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


TITLES = {
    FORWARD: "attention forward",
    BOTH: "attention forward + backward",
    SELECT: "select chunks",
    DECODE: "decode one token",
}


def rows_of(comparison: Comparison) -> list[dict[str, str]]:
    """Makes rows, one a result that was not left out; where each op has one shape, they show only the length."""
    results, (unit, factor) = comparison.results, rate_unit(comparison)
    one_shape = len(shapes_of(results)) == len({result.problem.family for result in results})
    return [_row(result, one_shape, unit, factor) for result in results if result.status != LEFT_OUT]


def shapes_of(results: Sequence[Result]) -> list[str]:
    """Says what is equal in the shapes, without their lengths: a line each, after the ops that have it."""
    kinds: dict[str, list[str]] = {}
    for result in results:
        kinds.setdefault(shape_of(result.problem), []).append(result.kind)
    return [f"{', '.join(dict.fromkeys(names))}: {shape}" for shape, names in kinds.items()]


def rate_unit(comparison: Comparison) -> tuple[str, float]:
    """Returns the unit of rates, and how many make a TFLOP/s: GFLOP/s where no peak reaches a TFLOP/s."""
    rates = [peaks.tflops for peaks in comparison.peaks.values() if peaks]
    rates += [result.tflops for result in comparison.results if result.tflops]
    return ("TFLOP/s", 1.0) if max(rates, default=0.0) >= 1 else ("GFLOP/s", 1e3)


def notes_of(results: Sequence[Result]) -> list[str]:
    """Writes a line for each reason why a contender was not timed, with the cases that it holds for."""
    cases: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        if result.status != TIMED:
            cases.setdefault((result.contender, result.status, result.note), []).append(
                f"{result.kind} {short_count(length_of(result.problem))}"
            )
    return [f"{status}: {name} in {', '.join(where)}: {note}" for (name, status, note), where in cases.items()]


def length_of(problem: Problem) -> int:
    """Returns the tokens of the context, by which a shape is called."""
    return problem.kv_len


def shape_of(problem: Problem) -> str:
    """Describes all of a shape but its length."""
    heads = f"H{problem.num_kv_heads}"
    if problem.family != "select":
        heads = f"HQ{problem.num_heads} {heads}"
    return f"B{problem.batch} {heads} D{problem.head_dim} C{problem.chunk_size} K{problem.top_k} {problem.dtype}"


def short_count(count: int) -> str:
    """Writes 16384 as 16K."""
    for factor, letter in ((1 << 20, "M"), (1 << 10, "K")):
        if count % factor == 0:
            return f"{count // factor}{letter}"
    return str(count)


def digits(value: float) -> str:
    """Writes three digits, and no exponent where there are more before the point."""
    return f"{value:.3g}" if value < 1e3 else f"{value:.0f}"


def _row(result: Result, one_shape: bool, unit: str, factor: float) -> dict[str, str]:
    length = short_count(length_of(result.problem))
    found = result.measurement
    return {
        "op": result.kind,
        "shape": length if one_shape else f"{length} {shape_of(result.problem)}",
        "contender": result.contender,
        "computes": result.computes,
        "median": f"{digits(found.median_ms)} ms" if found else result.status,
        "p20 – p80": f"{digits(found.p20_ms)} – {digits(found.p80_ms)}" if found else "",
        "time / ours": digits(result.ratio[0]) if result.ratio else "",
        unit: digits(factor * result.tflops) if result.tflops else "",
        "GB/s": digits(result.gb_s) if result.gb_s else "",
    }
