"""What notebooks show: records, comparisons and evaluations as tables, and the tour, which runs from top to bottom."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hsa_compile.autotune.tune import set_autotune
from hsa_compile.comparison.contender import SAME
from hsa_compile.comparison.result import FAILED, TIMED, Comparison, Result
from hsa_compile.model.evaluation.results import Cell, Results
from hsa_compile.problem import Problem
from hsa_compile.schedules.record import Measurement, TuningRecord
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import Target

EVIL = "<img src=x onerror=alert(1)> & 'more'"
PROBLEM = Problem(seq_len=4096, num_heads=16, num_kv_heads=1, head_dim=64, chunk_size=64, top_k=8)
ONE = Measurement(median_ms=1.0, p20_ms=0.9, p80_ms=1.1, repeats=15)
TARGET = replace(Target.parse("cpu"), name=EVIL)
RECORD = TuningRecord(
    problem=PROBLEM, target=TARGET, schedule=Schedule.of("token", block_tokens=4), measurement=ONE,
    default_measurement=replace(ONE, median_ms=2.0), trials=12, failures={"WrongResult": 2}, inputs="random",
    fingerprint="0123456789abcdef", versions={}, date="2026-02-03T04:05:06+00:00", verdict="it beats the default",
)  # fmt: skip
COMPARISON = Comparison(
    device=EVIL, command="hsa-compile bench", date="2026-02-03", versions={}, inputs="random", peaks={},
    results=[
        Result(kind="forward", problem=PROBLEM, contender="ours", computes=SAME, status=TIMED, measurement=ONE,
               ratio=(1.0, 1.0, 1.0), tflops=0.1, gb_s=3.0),
        Result(kind="forward", problem=PROBLEM, contender=EVIL, computes=SAME, status=FAILED, note=EVIL),
    ],
)  # fmt: skip
RESULTS = Results(
    model="tiny", settings={},
    cells=tuple(Cell(task="s-niah", haystack=EVIL, protocol="greedy", length=4096, depth=depth, num_samples=10,
                     num_correct=9) for depth in (0.5, None)),
)  # fmt: skip


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        (RECORD, ["HSA attention, forward: 4,096 tokens", "1 ms (measured)", "2.00x", "12 tried, 2 failed"]),
        (COMPARISON, ["ours", "1 ms", "failed: "]),
        (RESULTS, ["s-niah", "90"]),
    ],
    ids=["record", "comparison", "evaluation"],
)
def test_a_notebook_shows_a_table_in_which_nothing_runs(shown: object, words: list[str]) -> None:
    html = shown._repr_html_()  # type: ignore[attr-defined]
    text = "".join(ElementTree.fromstring(f"<div>{html}</div>").itertext())  # which forgives nothing
    assert "<img" not in html
    assert EVIL in text
    assert all(word in text for word in words)


TOUR = Path(__file__).parents[1] / "examples" / "tour.ipynb"


def cells(kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(TOUR.read_text())["cells"] if cell["cell_type"] == kind]


def test_the_tour_is_a_notebook_without_outputs_whose_cells_are_explained() -> None:
    notebook = json.loads(TOUR.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    assert kinds[0] == "markdown"
    assert not any(pair == ("code", "code") for pair in itertools.pairwise(kinds))
    assert len({cell["id"] for cell in notebook["cells"]}) == len(kinds)
    for cell in notebook["cells"]:
        assert cell["cell_type"] != "code" or (cell["outputs"], cell["execution_count"]) == ([], None)
    for source in cells("code"):
        compile(source, "tour.ipynb", "exec")


@pytest.mark.slow
@pytest.mark.usefixtures("without_compiler")
@pytest.mark.filterwarnings("ignore::hsa_compile.errors.HSACompileWarning")
@pytest.mark.parametrize(
    "small", [True, pytest.param(False, marks=pytest.mark.exhaustive)], ids=["small", "as-written"]
)
def test_the_tour_runs_from_top_to_bottom(small: bool, capsys: pytest.CaptureFixture[str]) -> None:
    script = "\n\n".join(cells("code")).replace("\nrecord\n", "\nprint(record._repr_html_())\n")  # as a notebook does
    if small:
        for written, quick in (
            ("timeout=12, trials=8", "timeout=1, trials=1, isolate=False"),
            ("length, heads, width, chunk, picks = 2048", "length, heads, width, chunk, picks = 256"),
            ("min_run_time=0.5", "min_run_time=0.01"),
        ):
            assert written in script
            script = script.replace(written, quick)
    try:
        exec(compile(script, "tour.ipynb", "exec"), {"__name__": "__main__"})
    finally:
        set_autotune("off")
    shown = capsys.readouterr()
    assert "hsa-compile: tuning hsa_forward" in shown.err
    assert "<caption>HSA attention, forward: " in shown.out
    assert float(re.findall(r"largest error: (\S+)", shown.out)[0]) < 1e-4
    assert len(re.findall(r"^(dense|hsa_attention) +[\d.]+ ms$", shown.out, re.MULTILINE)) == 2
