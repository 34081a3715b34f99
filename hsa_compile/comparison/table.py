"""A comparison as rows for people, and what of a shape they need to see."""

from collections.abc import Sequence

from hsa_compile.comparison.case import BOTH, DECODE, FORWARD, SELECT
from hsa_compile.comparison.result import LEFT_OUT, TIMED, Result
from hsa_compile.problem import Problem

TITLES = {
    FORWARD: "attention forward",
    BOTH: "attention forward + backward",
    SELECT: "select chunks",
    DECODE: "decode one token",
}


def rows_of(results: Sequence[Result]) -> list[dict[str, str]]:
    """One row a result, those that were left out aside; of what is equal in all shapes only the length is shown."""
    one_shape = len({shape_of(result.problem) for result in results if result.kind != SELECT}) <= 1
    return [_row(result, one_shape) for result in results if result.status != LEFT_OUT]


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


def _row(result: Result, one_shape: bool) -> dict[str, str]:
    length = short_count(length_of(result.problem))
    found = result.measurement
    return {
        "op": result.kind,
        "shape": length if one_shape else f"{length} {shape_of(result.problem)}",
        "contender": result.contender,
        "computes": result.computes,
        "median": f"{found.median_ms:.3g} ms" if found else result.status,
        "p20 – p80": f"{found.p20_ms:.3g} – {found.p80_ms:.3g}" if found else "",
        "time / ours": f"{result.ratio[0]:.3g}" if result.ratio else "",
        "GFLOP/s": f"{1e3 * result.tflops:.3g}" if result.tflops else "",
        "GB/s": f"{result.gb_s:.3g}" if result.gb_s else "",
    }
