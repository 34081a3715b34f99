"""A comparison survives its file, and is shown as a table and pictures."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hsa_compile.comparison import FORWARD
from hsa_compile.comparison.contender import DENSE, SAME
from hsa_compile.comparison.peaks import Peaks
from hsa_compile.comparison.result import (
    LEFT_OUT,
    TIMED,
    WRONG,
    Comparison,
    Result,
    digits,
    draw,
    notes_of,
    rate_unit,
    rows_of,
    shapes_of,
    short_count,
)
from hsa_compile.errors import InvalidArgument, SaveError
from hsa_compile.problem import Problem
from hsa_compile.schedules.record import Measurement


def timed(problem: Problem, name: str = "ours", computes: str = SAME, median: float = 2.0) -> Result:
    return Result(
        kind=FORWARD, problem=problem, contender=name, computes=computes, status=TIMED,
        measurement=Measurement(median_ms=median, p20_ms=median, p80_ms=median, repeats=3),
        ratio=(median / 2, median / 2, median / 2), tflops=0.5, gb_s=10.0,
    )  # fmt: skip


def untimed(problem: Problem, name: str, status: str, note: str) -> Result:
    return Result(kind=FORWARD, problem=problem, contender=name, computes=DENSE, status=status, note=note)


@pytest.fixture
def comparison(problem_of: Callable[..., Problem]) -> Comparison:
    results = []
    for length in (1024, 4096):
        problem = problem_of(FORWARD, length)
        results += [timed(problem), timed(problem, "dense", DENSE, 1500.0), untimed(problem, "x", LEFT_OUT, "no GPU")]
    results.append(untimed(problem_of(FORWARD, 4096), "y", WRONG, "o is off"))
    return Comparison(
        device="a CPU", command="hsa-compile bench", date="2026-01-02T03:04:05+00:00", versions={"torch": "2"},
        inputs="random", peaks={"float32": Peaks(tflops=0.9, gb_s=20.0, source="a guess")}, results=results,
    )  # fmt: skip


def test_a_file_gives_back_what_was_written(comparison: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    comparison.write(path)
    assert Comparison.read(path) == comparison
    with pytest.raises(SaveError, match="cannot be written"):
        comparison.write(tmp_path / "nowhere" / "bench.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"peaks": {}, "results": [{"kind": "forward"}]}'])
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(InvalidArgument, match=r"bench\.json (holds |is damaged or no JSON)"):
        Comparison.read(path)


def test_the_table_shows_times_and_what_is_wrong_and_the_notes_why(comparison: Comparison) -> None:
    rows = rows_of(comparison)
    assert [row["contender"] for row in rows] == ["ours", "dense", "ours", "dense", "y"]
    assert rows[1] == {
        "op": "forward", "shape": "1K", "contender": "dense", "computes": "dense", "median": "1500 ms",
        "p20 – p80": "1500 – 1500", "time / ours": "750", "GFLOP/s": "500", "GB/s": "10",
    }  # fmt: skip
    assert rows[-1]["median"] == "wrong"
    assert rows[-1]["time / ours"] == ""
    assert notes_of(comparison.results) == [
        "left out: x in forward 1K, forward 4K: no GPU",
        "wrong: y in forward 4K: o is off",
    ]
    assert shapes_of(comparison.results) == ["forward: B1 HQ4 H2 D16 C16 K3 float32"]


def test_several_shapes_are_told_apart_in_the_table(comparison: Comparison, problem_of: Callable[..., Problem]) -> None:
    results = [timed(problem_of(FORWARD, 1024)), timed(problem_of(FORWARD, 1024, "bfloat16"))]
    rows = rows_of(replace(comparison, results=results))
    assert [row["shape"] for row in rows] == [f"1K B1 HQ4 H2 D16 C16 K3 {name}" for name in ("float32", "bfloat16")]


def test_pictures_are_drawn_from_the_file_alone(comparison: Comparison, tmp_path: Path) -> None:
    comparison.write(tmp_path / "bench.json")
    paths = draw(Comparison.read(tmp_path / "bench.json"), tmp_path)
    assert [path.name for path in paths] == ["bench_time.png", "bench_roofline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    with pytest.raises(SaveError, match="cannot be written"):
        draw(comparison, tmp_path / "nowhere")


def test_nothing_timed_is_no_picture(comparison: Comparison, tmp_path: Path) -> None:
    assert draw(replace(comparison, results=comparison.results[-1:]), tmp_path) == []


def test_rates_are_in_the_unit_of_the_device(comparison: Comparison) -> None:
    assert rate_unit(comparison) == ("GFLOP/s", 1e3)
    gpu = replace(comparison, peaks={"bfloat16": Peaks(tflops=989.0, gb_s=3350.0, source="data sheet")})
    assert rate_unit(gpu) == ("TFLOP/s", 1.0)


def test_a_result_has_a_time_just_when_it_is_timed(problem_of: Callable[..., Problem]) -> None:
    with pytest.raises(InvalidArgument, match="a result that is timed has the measurement None"):
        untimed(problem_of(FORWARD), "x", TIMED, "")
    with pytest.raises(InvalidArgument, match="status = 'lost' is not one of"):
        untimed(problem_of(FORWARD), "x", "lost", "")


def test_numbers_are_short() -> None:
    assert [short_count(count) for count in (1000, 1024, 16384, 1 << 20)] == ["1000", "1K", "16K", "1M"]
    assert [digits(value) for value in (0.01234, 12.345, 999.4, 1234.5)] == ["0.0123", "12.3", "999", "1234"]
