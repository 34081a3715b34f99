"""HTML tables for notebooks and pages, and small charts as SVG, without a library and without a script."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 420, 260  # pixels of a chart
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 44
_STEPS = (1, 2, 5, 10)  # what a step between two ticks may be, times a power of ten
_MOST_TICKS = 6
_LETTER = 6.2  # pixels of a letter of a chart's text, about

Point = tuple[float, float]


def escaped(value: object) -> str:
    """Returns a value as text that is safe within HTML, in attributes, too."""
    return html.escape(str(value))


def html_table(rows: Sequence[Mapping[str, Any]], caption: str = "") -> str:
    """Makes a table of rows with equal keys; everything in it is escaped.

    Args:
        rows: the rows; the keys of the first are the headings.
        caption: a line above the table.
    """
    top = f"<caption>{escaped(caption)}</caption>" if caption else ""
    head = "".join(f"<th>{escaped(name)}</th>" for name in (rows[0] if rows else ()))
    lines = "".join("<tr>" + "".join(_cell(value) for value in row.values()) + "</tr>\n" for row in rows)
    return f"<table>{top}<thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table>"


def facts_table(facts: Mapping[str, Any], caption: str = "") -> str:
    """Makes a table of names and values; everything in it is escaped."""
    top = f"<caption>{escaped(caption)}</caption>" if caption else ""
    lines = "".join(f"<tr><th>{escaped(name)}</th>{_cell(value)}</tr>\n" for name, value in facts.items())
    return f"<table>{top}<tbody>{lines}</tbody></table>"


def _cell(value: object) -> str:
    text = escaped(value)
    return f'<td class="n">{text}</td>' if text[:1].isdigit() else f"<td>{text}</td>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One axis of a chart.

    Attributes:
        label: what it shows, with the unit.
        low, high: the values at its ends.
        is_log: whether equal distances are equal factors.
        names: what stands at 0, 1, 2 …, where the axis shows choices rather than numbers.
    """

    label: str
    low: float
    high: float
    is_log: bool = False
    names: tuple[str, ...] = ()

    @staticmethod
    def over(label: str, values: Iterable[float], *, is_log: bool = False) -> "Axis":
        """Returns an axis with room for all values; one that is not logarithmic begins at 0."""
        found = list(values)
        if is_log:
            return Axis(label=label, low=min(found) / 1.5, high=max(found) * 1.5, is_log=True)
        return Axis(label=label, low=0.0, high=1.08 * max(found))

    @staticmethod
    def of_choices(label: str, names: Sequence[str]) -> "Axis":
        """Returns an axis with a place for each name."""
        return Axis(label=label, low=-0.5, high=len(names) - 0.5, names=tuple(names))

    def share(self, value: float) -> float:
        """Returns where a value lies between the two ends, 0 … 1; what is beyond them lies at an end."""
        if self.is_log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, share))

    def ticks(self) -> list[tuple[float, str]]:
        """Returns the values that the axis names, and their names."""
        if self.names:
            return [(float(place), name) for place, name in enumerate(self.names)]
        if self.is_log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            factors = (1, 2, 5) if last - first < _MOST_TICKS // 3 else (1,)
            values = [factor * 10.0**power for power in range(first - 1, last + 1) for factor in factors]
            return [(value, f"{value:,g}") for value in values if self.low <= value <= self.high]
        span = self.high - self.low
        unit = 10.0 ** math.floor(math.log10(span / _MOST_TICKS))
        step = next(step * unit for step in _STEPS if span / (step * unit) <= _MOST_TICKS)
        return [(i * step, f"{i * step:,g}") for i in range(math.ceil(self.low / step), int(self.high / step) + 1)]


def chart(x: Axis, y: Axis, marks: Sequence[str], title: str, *, width: int = WIDTH) -> str:
    """Draws two axes and what lies between them.

    Args:
        x, y: the axes.
        marks: what `dots`, `line` and `note` gave for these axes.
        title: what the picture shows, for those who cannot see it.
        width: pixels.
    """
    left, right, top, bottom = _LEFT, width - _RIGHT, _TOP, HEIGHT - _BOTTOM
    parts = [f'<svg viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}" role="img">']
    parts.append(f"<title>{escaped(title)}</title>")
    for value, name in y.ticks():
        place = _down(y, value)
        parts.append(f'<path class="grid" d="M{left} {place:.1f}H{right}"/>')
        parts.append(f'<text class="end" x="{left - 6}" y="{place + 4:.1f}">{escaped(name)}</text>')
    for value, name in _fitting(x, width):
        parts.append(f'<text class="mid" x="{_across(x, value, width):.1f}" y="{bottom + 16}">{escaped(name)}</text>')
    parts += [
        f'<path class="axis" d="M{left} {top}V{bottom}H{right}"/>',
        f'<text class="mid" x="{(left + right) / 2:.0f}" y="{HEIGHT - 8}">{escaped(x.label)}</text>',
        f'<text class="mid" transform="translate(13 {(top + bottom) / 2:.0f}) rotate(-90)">{escaped(y.label)}</text>',
    ]
    return "\n".join([*parts, *marks, "</svg>"])


def dots(x: Axis, y: Axis, points: Iterable[Point], kind: str, *, width: int = WIDTH) -> str:
    """Draws dots as one path, which takes a dozen bytes for each. `kind` is a class of the page's style."""
    places = "".join(f"M{_across(x, a, width):.1f} {_down(y, b):.1f}h0" for a, b in points)
    return f'<path class="dots {kind}" d="{places}"/>'


def line(x: Axis, y: Axis, points: Iterable[Point], kind: str, *, width: int = WIDTH) -> str:
    """Draws a line through points. `kind` is a class of the page's style."""
    places = "L".join(f"{_across(x, a, width):.1f} {_down(y, b):.1f}" for a, b in points)
    return f'<path class="line {kind}" d="M{places}"/>'


def note(x: Axis, y: Axis, point: Point, text: str, *, width: int = WIDTH) -> str:
    """Writes a text above a point, on the side of it where there is room."""
    across, down = _across(x, point[0], width), _down(y, point[1])
    side = "end" if across > width / 2 else "start"
    return f'<text class="{side}" x="{across:.1f}" y="{max(down - 8, _TOP + 8):.1f}">{escaped(text)}</text>'


def _across(x: Axis, value: float, width: int) -> float:
    return _LEFT + x.share(value) * (width - _RIGHT - _LEFT)


def _down(y: Axis, value: float) -> float:
    return HEIGHT - _BOTTOM - y.share(value) * (HEIGHT - _BOTTOM - _TOP)


def _fitting(x: Axis, width: int) -> list[tuple[float, str]]:
    """Returns the ticks, or every second, third … of them where their names would run into each other."""
    ticks = x.ticks()
    room = (width - _RIGHT - _LEFT) / max(1, len(ticks))
    longest = max((len(name) for _, name in ticks), default=0) * _LETTER + 4
    return ticks[:: max(1, math.ceil(longest / room))]
