"""What came of one contender on one case, all of them as a file, and the rows and notes that are shown of them."""

import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hsa_compile.checks import check_choice, check_number, check_text, from_mapping, shown
from hsa_compile.comparison import BOTH, DECODE, FORWARD, KINDS, SELECT
from hsa_compile.comparison.contender import CLAIMS, DENSE, SAME, SPARSE
from hsa_compile.comparison.peaks import Peaks
from hsa_compile.errors import InvalidArgument, SaveError
from hsa_compile.files import read_json
from hsa_compile.markup import escaped, html_table
from hsa_compile.problem import Problem
from hsa_compile.schedules.record import MAX_MS, Measurement
from hsa_compile.versions import require

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

    def _repr_html_(self) -> str:
        """Returns the table that `hsa-compile bench` prints, for a notebook."""
        notes = "".join(f"<p>{escaped(line)}</p>" for line in notes_of(self.results))
        return html_table(rows_of(self), caption=f"{self.device}; {'; '.join(shapes_of(self.results))}") + notes

    @staticmethod
    def read(path: Path) -> "Comparison":
        """Reads what `write` wrote.

        Raises:
            InvalidArgument: the file cannot be read, or holds something else.
        """
        values = read_json(path, error=InvalidArgument)
        try:
            peaks = values["peaks"].items()
            values["peaks"] = {name: from_mapping(Peaks, one) if one else None for name, one in peaks}
            values["results"] = [_result(row) for row in values["results"]]
            return from_mapping(Comparison, values)
        except InvalidArgument as error:
            raise InvalidArgument(f"{path} holds no comparison: {error}") from error
        except (LookupError, TypeError, AttributeError) as error:
            raise InvalidArgument(f"{path} holds no comparison: {shown(str(error))}") from error

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
    check_choice("kind", row["kind"], KINDS)
    for name in ("contender", "note"):
        check_text(name, row[name])
    ratio = tuple(row["ratio"]) if row["ratio"] else None
    for value in (row["tflops"], row["gb_s"], *(ratio or ())):
        if value is not None:
            check_number("a rate or ratio", value, 0, MAX_MS)
    measurement = from_mapping(Measurement, row["measurement"]) if row["measurement"] else None
    problem = from_mapping(Problem, row["problem"])
    return from_mapping(Result, {**row, "problem": problem, "measurement": measurement, "ratio": ratio})


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


TIME_PICTURE, ROOFLINE_PICTURE = "bench_time.png", "bench_roofline.png"
_LINES = {SAME: "-", DENSE: "--", SPARSE: ":"}
_PANEL_INCHES = (3.7, 3.1)
_WIDE_INCHES = 10  # this has room for three columns of the legend
_LETTERS_PER_INCH = 12  # how many letters of a title fit in an inch
_ROOF = "0.45"  # a grey
_PEAK, _BOUND = "the device's peak", "roofline: what memory lets the op reach"
_FEW_DECADES = 300  # up to so far from top to bottom a log axis has room for 1, 2, 5 in each decade

Panels = Mapping[tuple[str, str], Sequence[Result]]  # by kind and shape


def draw(comparison: Comparison, directory: Path) -> list[Path]:
    """Writes `bench_time.png` and `bench_roofline.png`; nothing if nothing was timed.

    Raises:
        MissingDependency: matplotlib is not installed.
        SaveError: a file cannot be written.
    """
    require("matplotlib", "a picture").use("Agg")
    panels: dict[tuple[str, str], list[Result]] = {}
    for result in comparison.results:
        if result.status == TIMED:
            panels.setdefault((result.kind, shape_of(result.problem)), []).append(result)
    if not panels:
        return []
    return [
        _save(_times(comparison, panels), directory / TIME_PICTURE),
        _save(_rates(comparison, panels), directory / ROOFLINE_PICTURE),
    ]


def _times(comparison: Comparison, panels: Panels) -> Any:
    figure, axes = _grid(1, len(panels))
    colours = _colours(comparison)
    for axis, ((kind, shape), results) in zip(axes[0], panels.items(), strict=True):
        for name, rows in _by_contender(results).items():
            lengths = [length_of(row.problem) for row in rows]
            found = [row.measurement for row in rows if row.measurement]
            axis.plot(lengths, [one.median_ms for one in found], **_style(name, rows[0], colours))
            axis.fill_between(
                lengths, [one.p20_ms for one in found], [one.p80_ms for one in found],
                color=colours[name], alpha=0.15, linewidth=0,
            )  # fmt: skip
        _finish(axis, results, kind, shape)
    axes[0][0].set_ylabel("time, ms (median, band p20–p80)")
    _title(figure, axes, "Time by length", comparison)
    return figure


def _rates(comparison: Comparison, panels: Panels) -> Any:
    figure, axes = _grid(2, len(panels))
    colours, (unit, factor) = _colours(comparison), rate_unit(comparison)
    for (upper, lower), ((kind, shape), results) in zip(axes.T, panels.items(), strict=True):
        contenders = _by_contender(results)
        for name, rows in contenders.items():
            lengths = [length_of(row.problem) for row in rows]
            upper.plot(lengths, [factor * (row.tflops or math.nan) for row in rows], **_style(name, rows[0], colours))
            lower.plot(lengths, [row.gb_s or math.nan for row in rows], **_style(name, rows[0], colours))
        if peaks := comparison.peaks.get(results[0].problem.dtype):
            _roofs(upper, lower, next(iter(contenders.values())), peaks, factor)
        _finish(upper, results, kind, shape)
        _finish(lower, results)
    axes[0][0].set_ylabel(unit)
    axes[1][0].set_ylabel("GB/s")
    sources = dict.fromkeys(peaks.source for peaks in comparison.peaks.values() if peaks)
    _title(figure, axes, f"Rates reached, and the device's peaks ({'; '.join(sources) or 'not known'})", comparison)
    return figure


def _roofs(upper: Any, lower: Any, rows: Sequence[Result], peaks: Peaks, factor: float) -> None:
    """Draws the device's two peaks, and what both of them together allow at the FLOPs a byte of these rows."""
    upper.axhline(factor * peaks.tflops, color=_ROOF, linewidth=1.5, label=_PEAK)
    lower.axhline(peaks.gb_s, color=_ROOF, linewidth=1.5)
    counted = [(row.problem, row.tflops / row.gb_s) for row in rows if row.tflops and row.gb_s]
    bounds = [factor * peaks.attainable_tflops(1e3 * intensity) for _, intensity in counted]
    lengths = [length_of(problem) for problem, _ in counted]
    upper.plot(lengths, bounds, color="black", linestyle=(0, (1, 2)), label=_BOUND)


def _grid(rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    width, height = _PANEL_INCHES
    figure = Figure(figsize=(max(7.5, width * columns), height * rows + 1.3), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _colours(comparison: Comparison) -> dict[str, str]:
    """Gives each contender one colour, the same in all panels."""
    names = dict.fromkeys(row.contender for row in comparison.results)
    return {name: f"C{index}" for index, name in enumerate(names)}


def _style(name: str, row: Result, colours: Mapping[str, str]) -> dict[str, Any]:
    return {
        "color": colours[name],
        "linestyle": _LINES[row.computes],
        "linewidth": 2.5 if colours[name] == "C0" else 1.5,
        "marker": "o",
        "markersize": 5,
        "label": f"{name} ({row.computes})",
    }


def _by_contender(results: Sequence[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for row in sorted(results, key=lambda row: length_of(row.problem)):
        found.setdefault(row.contender, []).append(row)
    order = list(dict.fromkeys(row.contender for row in results))
    return {name: found[name] for name in order}


def _finish(axis: Any, results: Sequence[Result], kind: str = "", shape: str = "") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    lengths = sorted({length_of(row.problem) for row in results})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [short_count(length) for length in lengths])
    axis.xaxis.minorticks_off()
    low, high = axis.get_ylim()
    steps = (1.0, 2.0, 5.0) if high < _FEW_DECADES * low else (1.0,)
    axis.yaxis.set_major_locator(LogLocator(subs=steps, numticks=99))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("length, tokens")
    axis.grid(alpha=0.3)
    if kind:
        axis.set_title(f"{TITLES[kind]}\n{shape}", fontsize=9)


def _title(figure: Any, axes: Any, text: str, comparison: Comparison) -> None:
    width = figure.get_figwidth()
    figure.suptitle(f"{textwrap.fill(text, int(_LETTERS_PER_INCH * width))}\n{comparison.device}", fontsize=11)
    labels: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    names = sorted(labels, key=(_PEAK, _BOUND).__contains__)  # contenders first
    figure.legend(
        [labels[name] for name in names],
        names,
        loc="outside lower center",
        ncols=3 if width >= _WIDE_INCHES else 2,
        fontsize=9,
        frameon=False,
    )


def _save(figure: Any, path: Path) -> Path:
    write: Callable[..., object] = figure.savefig
    try:
        write(path, dpi=110)
    except OSError as error:
        raise SaveError(f"{path} cannot be written: {error.strerror or error}") from error
    return path
