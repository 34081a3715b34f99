"""The page of `hsa-compile report`: a section for each search, with its verdict, pictures and tables."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import FrozenTrial

from hsa_compile.autotune.bench.bench import quantile
from hsa_compile.autotune.evaluate import Outcome
from hsa_compile.autotune.samplers.point import schedule_of
from hsa_compile.autotune.study.storage import RECORD
from hsa_compile.autotune.study.trials import LEDGER, OUTCOME
from hsa_compile.checks import check_text, check_texts
from hsa_compile.cli.options import counted
from hsa_compile.comparison.peaks import Peaks
from hsa_compile.comparison.result import digits
from hsa_compile.errors import InvalidArgument
from hsa_compile.markup import Axis, Point, chart, dots, escaped, facts_table, html_table, line, note
from hsa_compile.problem import Problem
from hsa_compile.schedules.ops import count_work
from hsa_compile.schedules.record import TuningRecord
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace, default_schedule
from hsa_compile.target import Target

MOST_BYTES = 1_000_000  # a page that mail programs and chats take
_KNOB_WIDTH = 260

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5b6876; --paper: #fff; --card: #f5f7f9; --rule: #d5dbe1;
  --dot: #3b7dd8; --best: #c2410c; --base: #64748b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaee; --soft: #9aa7b4; --paper: #14191f; --card: #1c232b;
  --rule: #36414c; --dot: #6ea8f2; --best: #fb923c; --base: #94a3b8; } }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin: 3rem 0 .3rem; } h3 { font-size: 1rem; }
p.verdict { font-size: 1.1rem; } p.how, figcaption, caption { color: var(--soft); font-size: .87rem; text-align: left; }
code { font: .87em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
table { border-collapse: collapse; margin: .5rem 0; font-size: .87rem; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid var(--rule); padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top; }
td.n { font-variant-numeric: tabular-nums; white-space: nowrap; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; background: var(--card); border-radius: 8px; padding: .7rem; max-width: 100%; }
figcaption { max-width: 26rem; } .knobs figcaption { max-width: 16rem; }
svg { display: block; max-width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; }
.mid { text-anchor: middle; } .end { text-anchor: end; } .grid { stroke: var(--rule); } .axis { stroke: var(--soft); }
.axis, .line { fill: none; } .line { stroke-width: 2; } .line.best { stroke: var(--best); }
.line.base { stroke: var(--base); stroke-dasharray: 5 4; } .line.roof { stroke: var(--ink); }
.dots { stroke-linecap: round; stroke-width: 6; stroke: var(--dot); stroke-opacity: .55; }
.dots.best { stroke: var(--best); stroke-width: 9; stroke-opacity: 1; }
.dots.base { stroke: var(--base); stroke-width: 9; stroke-opacity: 1; }
summary { cursor: pointer; }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One trial of a search: its schedule and what became of it; `was_known` if the ledger had its times."""

    schedule: Schedule
    outcome: Outcome
    was_known: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """One study, as the page shows it.

    Attributes:
        name: the study's name in its storage.
        problem, target: what was tuned, and where.
        candidates: what was tried, in the order of the trials.
        record: what the search ended with; None if it has not ended.
        inputs, seed, versions: what else the search depends on.
        default_ms: the median of the default's times in all rounds, in milliseconds.
    """

    name: str
    problem: Problem
    target: Target
    candidates: tuple[Candidate, ...]
    record: TuningRecord | None
    inputs: str
    seed: int
    versions: Mapping[str, str]
    default_ms: float = field(init=False)

    def __post_init__(self) -> None:
        times = [time for one in self.candidates for time in one.outcome.default_times_ms]
        object.__setattr__(self, "default_ms", quantile(times, 0.5) if times else math.nan)

    @staticmethod
    def read(study: Any, trials: Sequence[FrozenTrial]) -> "Search | None":
        """Returns what a study of Optuna's holds; None if another version of hsa-compile made it in another form."""
        facts = study.user_attrs
        try:
            problem, target = Problem(**facts["problem"]), Target(**facts["target"])
            space = SearchSpace.of(problem, target)
            found = [
                Candidate(
                    schedule=schedule,
                    outcome=Outcome.from_dict(trial.user_attrs[OUTCOME]),
                    was_known=LEDGER in trial.user_attrs,
                )
                for trial in trials
                if OUTCOME in trial.user_attrs and (schedule := schedule_of(trial.params, space)) is not None
            ]
            record = TuningRecord.from_dict(facts[RECORD]) if RECORD in facts else None
            check_text("inputs", facts["inputs"])
            check_texts("versions", facts["versions"])
            return Search(
                name=study.study_name,
                problem=problem,
                target=target,
                candidates=tuple({one.schedule: one for one in reversed(found)}.values())[::-1],
                record=record,
                inputs=facts["inputs"],
                seed=facts["seed"],
                versions=facts["versions"],
            )
        except (InvalidArgument, LookupError, TypeError, ValueError, AttributeError):
            return None

    @property
    def timed(self) -> list[Candidate]:
        """The candidates that have a time."""
        return [one for one in self.candidates if one.outcome.ratio is not None]

    def ms(self, candidate: Candidate) -> float:
        """Returns a candidate's time in ms: its ratio to the default in the same rounds, by the default's median."""
        assert candidate.outcome.ratio is not None
        return candidate.outcome.ratio * self.default_ms

    @property
    def winner(self) -> Candidate:
        """The candidate of the record, or while there is none the fastest so far."""
        own = [one for one in self.timed if self.record and one.schedule == self.record.schedule]
        return own[0] if own else min(self.timed, key=self.ms)


def page(searches: Sequence[Search], peaks: Sequence[Peaks | None]) -> tuple[str, int]:
    """Returns the page, and how many of the oldest searches have no room in it.

    Args:
        searches: what to show, the oldest first.
        peaks: the roofs of each search's device, where they are known.
    """
    names = dict.fromkeys(search.target.name for search in searches)
    title = f"Kernels of Hierarchical Sparse Attention, tuned for {', '.join(names)}"
    sections: list[str] = []
    size = len(_frame(title, _overview(searches), []).encode(errors="replace"))
    for search, roofs in zip(reversed(searches), reversed(peaks), strict=True):
        section = _section(search, roofs)
        size += len(section.encode(errors="replace"))
        if size > MOST_BYTES:
            break
        sections.insert(0, section)
    left_out = len(searches) - len(sections)
    return _frame(title, _overview(searches[left_out:]), sections), left_out


def _frame(title: str, overview: str, sections: Sequence[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{escaped(title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n<h1>{escaped(title)}</h1>\n"
        f"{overview}\n{''.join(sections)}</body></html>\n"
    )


def _overview(searches: Sequence[Search]) -> str:
    rows = [
        {
            "problem": search.problem.in_words(),
            "default": f"{digits(search.default_ms)} ms",
            "winner": f"{digits(search.ms(search.winner))} ms",
            "gain": f"{search.default_ms / search.ms(search.winner):.2f}x",
            "candidates": len(search.candidates),
        }
        for search in searches
    ]
    how = (
        "Each candidate was compared with the float64 definition of the op, and then timed in turns with the default "
        "schedule. Times are medians in milliseconds of wall time: the candidate's ratio to the default in the same "
        "rounds, times the median of the default, so that the machine's drift does not show. A gain is the "
        "default's time over the winner's."
    )
    return f'{html_table(rows)}\n<p class="how">{how}</p>'


def _section(search: Search, peaks: Peaks | None) -> str:
    title, _, shape = search.problem.in_words().partition(": ")
    figures = [_history(search), _roofline(search, peaks)]
    knobs = list(_knobs(search))
    parts = [
        f"<section><h2>{escaped(title)}</h2>\n<p>{escaped(shape)}</p>",
        f'<p class="verdict">{escaped(verdict(search))}</p>\n<p>Winner: <code>{search.winner.schedule}</code></p>',
        f'<div class="charts">{"".join(figures)}</div>',
    ]
    if knobs:
        how = "Each dot is a candidate. Under a picture: the best time with each value, over the best time of all."
        parts.append(f'<h3>What each knob costs</h3><p class="how">{how}</p>')
        parts.append(f'<div class="charts knobs">{"".join(knobs)}</div>')
    parts.append(f"<details><summary>All {counted(len(search.candidates), 'candidate')}</summary>{_trials(search)}")
    parts.append(f"</details>\n<h3>Machine and search</h3>{_machine(search, peaks)}</section>\n")
    return "\n".join(parts)


def verdict(search: Search) -> str:
    """Says in words what a search found, how sure that is, and what failed."""
    record, best = search.record, search.winner
    failed = Counter(one.outcome.failure for one in search.candidates if one.outcome.failure)
    counts = f"{counted(len(search.timed), 'candidate')} timed"
    if failed:
        counts += f", {failed.total()} failed ({', '.join(f'{n} {name}' for name, n in sorted(failed.items()))})"
    if record is None:
        gain = search.default_ms / search.ms(best)
        return (
            f"The search has not ended. So far the best candidate takes {digits(search.ms(best))} ms, {gain:.2f}x as "
            f"fast as the default's {digits(search.default_ms)} ms; no play-off was held yet. {counts}."
        )
    time, default = record.measurement.median_ms, record.default_measurement.median_ms
    found = f"The default stays, at {digits(time)} ms"
    if not record.is_default:
        found = (
            f"The winner takes {digits(time)} ms, {record.speedup:.2f}x as fast as the default's {digits(default)} ms"
        )
    return f"{found}. In the play-off: {record.verdict}. {counts}."


def _history(search: Search) -> str:
    """Draws the time of each candidate in the order of the trials, the best so far, and the default."""
    numbered = list(enumerate(search.candidates, start=1))
    timed = [(number, search.ms(one)) for number, one in numbered if one.outcome.ratio is not None]
    best: list[Point] = []
    for number, ms in timed:
        before = best[-1][1] if best else ms
        best += [(number, before), (number, min(before, ms))]
    last = len(search.candidates)
    x = Axis(label="trial", low=0, high=last + 1)
    y = Axis.over("time, ms", [ms for _, ms in timed], is_log=_is_spread(ms for _, ms in timed))
    won = next((number, search.ms(one)) for number, one in numbered if one is search.winner)
    marks = [
        line(x, y, [(0, search.default_ms), (last + 1, search.default_ms)], "base"),
        line(x, y, [*best, (last + 1, best[-1][1])], "best"),
        dots(x, y, timed, ""),
        dots(x, y, [won], "best"),
    ]
    caption = "Time against trial. The line is the best so far, the dashed line the default, the large dot the winner."
    return _figure(chart(x, y, marks, "Time of each candidate against its trial"), caption)


def _roofline(search: Search, peaks: Peaks | None) -> str:
    """Draws the rates of all candidates below the device's roof, and says what share of it the winner reaches."""
    work = count_work(search.problem, search.winner.schedule)
    seconds = search.ms(search.winner) / 1e3
    rate, moved = work.flops / seconds / 1e9, work.memory_bytes / seconds / 1e9
    reached = f"The winner computes {digits(rate)} GFLOP/s and moves {digits(moved)} GB/s"
    if peaks is None:
        return f"<figure><figcaption>{reached}. The peaks of this device are not known here.</figcaption></figure>"
    points = [(_intensity(search.problem, one.schedule), one) for one in search.timed]
    rates = [(per_byte, per_byte * _bytes_a_second(search, one) / 1e9) for per_byte, one in points]
    won = (work.flops / work.memory_bytes, rate)
    ridge = 1e3 * peaks.tflops / peaks.gb_s
    x = Axis.over("FLOPs a byte of memory", [won[0] / 8, won[0] * 8, ridge / 2, ridge * 2], is_log=True)
    roof = [(at, 1e3 * peaks.attainable_tflops(at)) for at in (x.low, ridge, x.high)]
    y = Axis.over("GFLOP/s", [*(value for _, value in rates), 1e3 * peaks.tflops], is_log=True)
    roof = [(max(at, y.low / peaks.gb_s), max(value, y.low)) for at, value in roof]
    share = rate / (1e3 * peaks.attainable_tflops(won[0]))
    bound = "memory" if won[0] < ridge else "matrix products"
    marks = [
        line(x, y, roof, "roof"),
        dots(x, y, rates, ""),
        dots(x, y, [won], "best"),
        note(x, y, won, f"{share:.0%}"),
    ]
    caption = (
        f"Roofline. {reached}: {share:.0%} of what {bound} allow at {digits(won[0])} FLOPs a byte if each tensor is "
        f"moved once. Peaks: {peaks.source}."
    )
    if share > 1:
        caption += " More than all of it: the tensors lie in a cache, or the machine was busy when they were measured."
    return _figure(chart(x, y, marks, "Rates of the candidates below the roof of the device"), caption)


def _intensity(problem: Problem, schedule: Schedule) -> float:
    work = count_work(problem, schedule)
    return work.flops / work.memory_bytes


def _bytes_a_second(search: Search, candidate: Candidate) -> float:
    return count_work(search.problem, candidate.schedule).memory_bytes / search.ms(candidate) * 1e3


def _knobs(search: Search) -> Iterator[str]:
    """Yields a picture for the dataflow and for each knob of the winner's dataflow that had several values."""
    best = min(map(search.ms, search.timed))
    is_log = _is_spread(map(search.ms, search.timed))
    for knob in search.winner.schedule:
        among = [one for one in search.timed if knob == "dataflow" or
                 one.schedule.dataflow == search.winner.schedule.dataflow]  # fmt: skip
        times: dict[Any, list[float]] = {}
        for one in among:
            times.setdefault(one.schedule[knob], []).append(search.ms(one))
        if len(times) < 2:
            continue
        values = sorted(times, key=lambda value: (isinstance(value, str), value))
        x = Axis.of_choices(knob, [str(value) for value in values])
        y = Axis.over("time, ms", map(search.ms, search.timed), is_log=is_log)
        points = [(place, ms) for place, value in enumerate(values) for ms in times[value]]
        own = (values.index(search.winner.schedule[knob]), search.ms(search.winner))
        marks = [dots(x, y, points, "", width=_KNOB_WIDTH), dots(x, y, [own], "best", width=_KNOB_WIDTH)]
        caption = ", ".join(f"{value}: {min(times[value]) / best:.2f}x" for value in values)
        yield _figure(chart(x, y, marks, f"Times along the knob {knob}", width=_KNOB_WIDTH), caption)


def _is_spread(times: Iterable[float]) -> bool:
    """Returns whether times differ so much that only a logarithmic axis shows the fast ones apart."""
    found = list(times)
    return max(found) > 5 * min(found)


def _figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{escaped(caption)}</figcaption></figure>\n"


def _trials(search: Search) -> str:
    default = default_schedule(search.problem, search.target)
    rows = []
    for number, one in enumerate(search.candidates, start=1):
        marks = ["default"] * (one.schedule == default) + ["winner"] * (one is search.winner)
        marks += ["timed by an earlier search"] * one.was_known
        ratio = one.outcome.ratio
        rows.append(
            {
                "trial": number,
                "time": "" if ratio is None else f"{digits(search.ms(one))} ms",
                "of the default's": "" if ratio is None else f"{ratio:.3f}",
                "rounds": len(one.outcome.times_ms) or "",
                "schedule": str(one.schedule),
                "note": ", ".join(marks) or ": ".join(filter(None, (one.outcome.failure, one.outcome.reason))),
            }
        )
    return html_table(rows)


def _machine(search: Search, peaks: Peaks | None) -> str:
    target, record = search.target, search.record
    unit = "core" if target.kind == "cpu" else "multiprocessor"
    facts = {
        "device": f"{target.name} ({target.kind} {target.arch}, {counted(target.num_cores, unit)})",
        "peaks": f"{digits(1e3 * peaks.tflops)} GFLOP/s, {digits(peaks.gb_s)} GB/s" if peaks else "not known here",
        "versions": ", ".join(f"{name} {version}" for name, version in search.versions.items()),
        "inputs": f"{search.inputs} picks, seed {search.seed}",
        "ended": record.date.replace("T", " ") if record else "not yet",
        "study": search.name,
        "problem": search.problem.describe(),
    }
    return facts_table(facts)
