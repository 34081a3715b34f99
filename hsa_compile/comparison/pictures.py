"""Pictures of a comparison: time by length, and which rates were reached beside the device's peaks."""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hsa_compile.comparison.contender import DENSE, SAME, SPARSE
from hsa_compile.comparison.peaks import Peaks
from hsa_compile.comparison.result import TIMED, TITLES, Comparison, Result, length_of, rate_unit, shape_of, short_count
from hsa_compile.errors import SaveError
from hsa_compile.versions import require

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
