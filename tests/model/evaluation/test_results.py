"""Tables, JSON, CSV and pictures say what was found."""

import csv
import json
import sys
from pathlib import Path

import pytest

from hsa_compile.errors import MissingDependency
from hsa_compile.model.evaluation.perplexity import Perplexity
from hsa_compile.model.evaluation.results import Cell, Results, draw
from hsa_compile.model.evaluation.settings import length_label


def cell(
    length: int, depth: float | None, correct: int, samples: int = 4, protocol: str = "greedy", task: str = "vt"
) -> Cell:
    places = {"by_offset": {0: (5, 5), 31: (samples - 5, 0)}, "cut": (samples - 5, 0)} if depth is None else {}
    return Cell(task=task, haystack="my text", protocol=protocol, length=length, depth=depth, num_samples=samples,
                num_correct=correct, **places)  # fmt: skip


RESULTS = Results(
    model="run7",
    settings={"seed": 3},
    cells=tuple(
        each
        for protocol in ("teacher-forced", "greedy")
        for length in (4096, 2**20)
        for each in (
            cell(length, 0.0, 4, protocol=protocol),
            cell(length, 0.25, 1, protocol=protocol),
            cell(length, None, 5, 8, protocol=protocol),
        )
    ),
    perplexities=(
        Perplexity(text="stdlib", are_documents=True, length=512, num_texts=6, num_scored=256, perplexity=3.25,
                   standard_error=0.5, bits_per_byte=1.7, change=0.0, change_error=0.0),
        Perplexity(text="stdlib", are_documents=True, length=65536, num_texts=1, num_scored=256, perplexity=3.0,
                   standard_error=None, bits_per_byte=1.6, change=-0.077, change_error=None),
    ),
)  # fmt: skip


def test_labels_of_lengths() -> None:
    assert [length_label(n) for n in (4096, 65536, 2**20, 16 * 2**20, 1000, 1536)] == [
        "4K", "64K", "1M", "16M", "1000", "1536",
    ]  # fmt: skip


def test_json_names_protocols_and_intervals(tmp_path: Path) -> None:
    RESULTS.write(tmp_path)
    values = json.loads((tmp_path / "results.json").read_text())
    assert values == RESULTS.to_dict()
    assert values["settings"] == {"seed": 3}
    assert list(values["protocols"]) == ["teacher-forced", "greedy"]
    assert values["retrieval"][1] == {
        "task": "vt", "haystack": "my text", "protocol": "teacher-forced", "length": 4096, "depth": 0.25,
        "samples": 4, "correct": 1, "accuracy": 0.25, "low": pytest.approx(0.0456, abs=1e-4),
        "high": pytest.approx(0.6994, abs=1e-4), "chance": 1e-4 / 26**6,
    }  # fmt: skip
    assert values["retrieval"][2]["depth"] is None
    assert values["retrieval"][2]["by_offset"] == {
        "0": {"samples": 5, "correct": 5}, "31": {"samples": 3, "correct": 0},
    }  # fmt: skip
    assert values["retrieval"][2]["cut_by_a_border"] == {"samples": 3, "correct": 0}
    assert values["tasks"] == {"vt": {"public": "RULER vt", "chance": 1e-4 / 26**6, "any_needle": 0.5}}
    assert values["means"] == []
    assert values["perplexity"][1]["standard_error"] is None


def test_csv_holds_a_row_for_each_cell(tmp_path: Path) -> None:
    RESULTS.write(tmp_path)
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 + 2
    assert [rows[2][name] for name in ("model", "protocol", "length", "depth", "samples", "accuracy")] == [
        "run7", "teacher-forced", "4096", "all", "8", "0.625",
    ]  # fmt: skip
    assert [rows[-1][name] for name in ("task", "length", "perplexity", "standard_error", "change")] == [
        "ppl", "65536", "3.0", "", "-0.077",
    ]  # fmt: skip


def test_tables_have_a_row_a_task_and_say_where_needles_lay() -> None:
    first, places, second, _, last = RESULTS.tables()
    assert first.startswith("right answers in %, teacher-forced\n")
    assert second.startswith("right answers in %, greedy\n")
    assert first.splitlines()[-1].split() == [
        "vt", "my", "text", "1M", "100", "25", "62.5", "30.6", "–", "86.3", "3.2e-11", "8",
    ]  # fmt: skip
    assert places.splitlines()[1].split()[:3] == ["task", "0–3", "4–7"]
    assert places.splitlines()[-1].split() == ["vt", "100", "0", "38", "0", "100"]
    assert "last 256 tokens of held-out documents of stdlib" in last
    assert "against 512" in last
    assert last.splitlines()[-2].split() == ["512", "3.25", "0.5", "1.7000", "6"]
    assert last.splitlines()[-1].split() == ["64K", "3", "1.6000", "-7.70", "%", "1"]


def test_the_mean_of_several_tasks_stands_below_them() -> None:
    cells = [
        cell(length, None, 8 if task == "vt" else 6, 8, task=task) for task in ("vt", "cwe") for length in (64, 4096)
    ]
    results = Results(model="run7", settings={}, cells=tuple(cells[:3]))
    assert [(mean.length, mean.accuracy) for mean in results.means] == [(64, 0.875)]
    assert results.tables()[0].splitlines()[-1].split()[:5] == ["mean", "of", "2", "64", "87.5"]
    (mean,) = results.to_dict()["means"]
    assert (mean["tasks"], mean["length"], mean["accuracy"]) == (2, 64, 0.875)
    assert 0.5 < mean["low"] < 0.875 < mean["high"] < 1


@pytest.mark.slow
def test_pictures_are_written(tmp_path: Path) -> None:
    paths = draw(RESULTS, tmp_path)
    assert [path.name for path in paths] == ["vt-my_text.png", "ppl.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_without_matplotlib_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependency, match=r"pip install 'hsa-compile\[plots\]'"):
        draw(RESULTS, tmp_path)
