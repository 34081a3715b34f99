"""A comparison as rows for people, and what of a shape they need to see."""

from collections.abc import Sequence

from hsa_compile.comparison.choices import BOTH, DECODE, FORWARD, SELECT
from hsa_compile.comparison.result import LEFT_OUT, TIMED, Comparison, Result
from hsa_compile.problem import Problem

TITLES = {
    FORWARD: "attention forward",
    BOTH: "attention forward + backward",
    SELECT: "select chunks",
    DECODE: "decode one token",
}


def rows_of(comparison: Comparison) -> list[dict[str, str]]:
    """One row a result, those that were left out aside; where each op has one shape, only the length is shown."""
    results, (unit, factor) = comparison.results, rate_unit(comparison)
    one_shape = len(shapes_of(results)) == len({result.problem.selects for result in results})
    return [_row(result, one_shape, unit, factor) for result in results if result.status != LEFT_OUT]


def shapes_of(results: Sequence[Result]) -> list[str]:
    """All that is equal in the shapes but their lengths, a line each, after the ops that have it."""
    kinds: dict[str, list[str]] = {}
    for result in results:
        kinds.setdefault(shape_of(result.problem), []).append(result.kind)
    return [f"{', '.join(dict.fromkeys(names))}: {shape}" for shape, names in kinds.items()]


def rate_unit(comparison: Comparison) -> tuple[str, float]:
    """What rates are shown in, and how many there are in a TFLOP/s: GFLOP/s where no peak reaches a TFLOP/s."""
    rates = [peaks.tflops for peaks in comparison.peaks.values() if peaks]
    rates += [result.tflops for result in comparison.results if result.tflops]
    return ("TFLOP/s", 1.0) if max(rates, default=0.0) >= 1 else ("GFLOP/s", 1e3)


def notes_of(results: Sequence[Result]) -> list[str]:
    """A line for each reason why a contender was not timed, with the cases that it holds for."""
    cases: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        if result.status != TIMED:
            cases.setdefault((result.contender, result.status, result.note), []).append(
                f"{result.kind} {short_count(length_of(result.problem))}"
            )
    return [f"{status}: {name} in {', '.join(where)}: {note}" for (name, status, note), where in cases.items()]


def length_of(problem: Problem) -> int:
    """Tokens of the context: what a shape is called by."""
    return problem.kv_len


def shape_of(problem: Problem) -> str:
    """All of a shape but its length."""
    heads = f"HQ{problem.num_heads} H{problem.num_kv_heads}" if not problem.selects else f"H{problem.num_kv_heads}"
    return f"B{problem.batch} {heads} D{problem.head_dim} C{problem.chunk_size} K{problem.top_k} {problem.dtype}"


def short_count(count: int) -> str:
    """16384 as 16K."""
    for factor, letter in ((1 << 20, "M"), (1 << 10, "K")):
        if count % factor == 0:
            return f"{count // factor}{letter}"
    return str(count)


def digits(value: float) -> str:
    """Three of them, and no exponent where there are more before the point."""
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
