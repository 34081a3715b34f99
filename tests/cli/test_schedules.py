"""`hsa-compile schedules`: what it lists, explains, compares, moves and removes."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from shell import SHAPE, Outcome, Shell, record_of

from hsa_compile.problem import OPS
from hsa_compile.schedules.cache import ScheduleCache, default_cache
from hsa_compile.schedules.exchange import export_records
from hsa_compile.schedules.record import Measurement
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import Target


def test_an_empty_list_says_how_to_fill_it(run: Shell) -> None:
    assert run("schedules", "list") == Outcome(0, "nothing has been tuned yet: hsa-compile tune\n", "")
    assert run("schedules", "list", "--json").json == []


@pytest.mark.usefixtures("stored")
def test_the_list_is_a_table_of_problems_and_schedules(run: Shell) -> None:
    table = run("schedules", "list")
    assert table.code == 0
    rows, _, legend = table.out.partition("\n\n")
    assert len(rows.splitlines()) == 2 + 2
    assert "gain         the default schedule's time over that of this one" in legend
    for op in OPS:
        assert f"{op} B1 T128 HQ4 H1 D16 C16 K2 float32" in table.out


@pytest.mark.usefixtures("stored")
def test_show_prints_one_entry_whole(run: Shell) -> None:
    entries = run("schedules", "list", "--json").json
    shown = run("schedules", "show", "2")
    assert shown.code == 0
    assert shown.json == entries[1]
    assert {"schedule", "measurement", "versions", "date", "fingerprint"} <= set(shown.json)


@pytest.mark.usefixtures("stored")
def test_show_of_an_entry_that_is_not_there_says_how_many_there_are(run: Shell) -> None:
    for number in ("0", "3"):
        expected = f"error: entry {number} does not exist; there are 2\n"
        assert run("schedules", "show", number) == Outcome(2, "", expected)


@pytest.mark.usefixtures("stored")
def test_path_is_the_file_that_holds_the_entries(run: Shell, tmp_path: Path) -> None:
    outcome = run("schedules", "path", "--device", "cpu")
    path = Path(outcome.out.strip())
    assert path.parent == tmp_path / "cache" / "schedules"
    assert len(json.loads(path.read_text())["entries"]) == 2
    assert run("schedules", "path", "--device", "sm_90").out.strip().endswith("/sm-90.json")


@pytest.mark.usefixtures("stored")
def test_clear_removes_what_was_tuned(run: Shell) -> None:
    assert run("schedules", "clear", "--device", "sm_90", "--yes").out == "removed 0 schedules\n"
    assert run("schedules", "clear", "--device", "cpu", "--yes") == Outcome(0, "removed 2 schedules\n", "")
    assert run("schedules", "list", "--json").json == []


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize(("answer", "left"), [("y\n", 0), ("n\n", 2), ("\n", 2)], ids=["yes", "no", "enter"])
def test_clear_asks_first(answer: str, left: int, run: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "answer").write_text(answer)
    with (tmp_path / "answer").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        outcome = run("schedules", "clear")
    assert outcome.code == 0
    assert "Remove all schedules of every device?" in outcome.err
    assert outcome.out == ("removed 2 schedules\n" if left == 0 else "removed nothing\n")
    assert len(run("schedules", "list", "--json").json) == left


@pytest.mark.usefixtures("stored")
def test_clear_names_the_flag_where_nobody_answers(run: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path(os.devnull).open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        outcome = run("schedules", "clear")
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1] == "error: nobody answers on standard input; --yes removes without asking"
    assert len(run("schedules", "list", "--json").json) == 2


def test_the_list_tells_predicted_from_measured_and_kernels_of_another_text(run: Shell) -> None:
    time = Measurement.predicted(1.0)
    default_cache().put(record_of(OPS[0]))
    default_cache().put(replace(record_of(OPS[1]), kind="predicted", measurement=time, default_measurement=time))
    default_cache().put(replace(record_of(OPS[1]), kernel_source="0123456789ab"))
    rows = [line.split() for line in run("schedules", "list").out.partition("\n\n")[0].splitlines()[2:]]
    assert [row[2] for row in rows] == ["measured", "predicted", "measured"]
    assert [row[-1] for row in rows] == ["these", "these", "others"]


@pytest.mark.usefixtures("stored")
def test_explain_tells_the_entry_its_loss_and_why_no_other_serves(run: Shell) -> None:
    exact = run("schedules", "explain", *SHAPE, "--device", "cpu", "--op", "forward")
    assert exact.code == 0
    for words in (
        "runs      token block_tokens=4",
        "exact: hsa_forward B1 T128",
        "expected to lose  none",
        "op hsa_backward",
    ):
        assert words in exact.out
    near = run("schedules", "explain", *SHAPE, "--device", "cpu", "--op", "forward", "--top-k", "8", "--json").json
    assert (near[0]["how"], near[0]["distance"], near[0]["schedule"]) == (
        "nearest",
        2.0,
        {"dataflow": "token", "block_tokens": 4},
    )
    assert near[0]["differences"] == {"top_k": {"asked": 8, "entry": 2, "distance": 2.0}}
    assert near[0]["others"][0]["why_not"] == "must match: op"


def test_explain_of_a_default_says_so(run: Shell) -> None:
    outcome = run("schedules", "explain", "--device", "h100", "--op", "forward")
    assert outcome.code == 0
    assert "on NVIDIA H100 80GB HBM3" in outcome.out
    assert "the default for this kind of device" in outcome.out


@pytest.mark.usefixtures("stored")
def test_diff_of_two_entries_shows_the_fields_that_differ(run: Shell) -> None:
    rows = run("schedules", "diff", "1", "2", "--json").json
    assert {row["field"] for row in rows} == {"problem.op", "kernel_source"}
    assert run("schedules", "diff", "1", "1").out == "the entries are equal\n"


@pytest.mark.usefixtures("stored")
def test_diff_of_a_file_and_a_device_goes_problem_by_problem(run: Shell, tmp_path: Path) -> None:
    exported = str(tmp_path / "all.json")
    assert run("schedules", "export", exported).code == 0
    default_cache().put(replace(record_of(OPS[0]), schedule=Schedule.of("token", block_tokens=1)))
    verdicts = [row["verdict"] for row in run("schedules", "diff", exported, "cpu", "--json").json]
    assert verdicts == ["another schedule", "same entry"]
    stored_in = str(default_cache().path(Target.parse("cpu")))
    verdicts = [row["verdict"] for row in run("schedules", "diff", stored_in, "sm_90", "--json").json]
    assert verdicts == ["only in the one"] * 2


def test_diff_compares_entries_of_several_devices_each_with_its_own(run: Shell, tmp_path: Path) -> None:
    here, there = record_of(OPS[0]), replace(record_of(OPS[0]), target=replace(Target.parse("cpu"), num_cores=99))
    changed = replace(here, schedule=Schedule.of("token", block_tokens=1))
    for name, records in (("one.json", [here, there]), ("other.json", [changed, there])):
        export_records(tmp_path / name, records)
    rows = run("schedules", "diff", str(tmp_path / "one.json"), str(tmp_path / "other.json"), "--json").json
    assert [row["verdict"] for row in rows] == ["another schedule", "same entry"]
    assert rows[1]["device"].endswith(", 99 cores")


def test_diff_compares_the_users_own_entry_and_not_the_shipped_one(
    run: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hsa_compile.schedules.cache.PRETUNED_DIR", tmp_path / "shipped")
    shipped = replace(record_of(OPS[0]), schedule=Schedule.of("token", block_tokens=1))
    ScheduleCache(tmp_path / "shipped").put(shipped)
    default_cache().put(record_of(OPS[0]))
    export_records(tmp_path / "own.json", [record_of(OPS[0])])
    (row,) = run("schedules", "diff", str(tmp_path / "own.json"), "cpu", "--json").json
    assert row["verdict"] == "same entry"


@pytest.mark.usefixtures("stored")
def test_what_is_exported_can_be_imported_and_counts_what_it_did(run: Shell, tmp_path: Path) -> None:
    exported = str(tmp_path / "all.json")
    assert run("schedules", "export", exported) == Outcome(0, f"wrote 2 schedules to {exported}\n", "")
    assert run("schedules", "import", exported).out == "0 new, 0 replaced, 2 kept as they were\n"
    run("schedules", "clear", "--yes")
    assert run("schedules", "import", exported).out == "2 new, 0 replaced, 0 kept as they were\n"
    assert len(run("schedules", "list", "--json").json) == 2


def test_an_import_of_kernels_of_another_text_is_refused(run: Shell, tmp_path: Path) -> None:
    exported = str(tmp_path / "all.json")
    default_cache().put(replace(record_of(OPS[0]), kernel_source="0123456789ab"))
    run("schedules", "export", exported)
    outcome = run("schedules", "import", exported)
    assert (outcome.code, outcome.out) == (2, "")
    assert "all 1 entries" in outcome.err
    assert "kernels of another text" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "all.json"], "there is nothing to export"),
        (["import", "none.json"], "'none.json' does not exist"),
        (["import", __file__], "is damaged or no JSON"),
        (["diff", "1", "2"], "entry 1 does not exist; there are 0"),
        (["diff", "1", "cpu"], "1 is the number of an entry"),
        (["diff", "none.json", "cpu"], "file 'none.json' does not exist"),
        (["diff", "cpu", "banana"], "device 'banana' is not known"),
        (["explain", "--device", "banana"], "device 'banana' is not known"),
        (["explain", "--device", "sm_90", "--dtype", "fp64"], "use the CPU"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, run: Shell) -> None:
    outcome = run("schedules", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert len(outcome.err.splitlines()) == 1
