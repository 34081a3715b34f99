"""Without an extra a command ends with exit code 2 and one line that says what to install."""

import sys
from pathlib import Path

import pytest
from shell import Shell


def assert_names(run: Shell, hidden: str, extra: str, *words: str) -> None:
    run.monkeypatch.setitem(sys.modules, hidden, None)
    outcome = run(*words)
    assert (outcome.code, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(f"needs {hidden}: pip install 'hsa-compile[{extra}]'")


@pytest.mark.parametrize(
    ("hidden", "name"), [("pyarrow", "a.parquet"), ("zstandard", "a.jsonl.zst"), ("datasets", "hf:some/set")]
)
def test_preparing_needs_what_reads_the_source(hidden: str, name: str, run: Shell, tmp_path: Path) -> None:
    source = name
    if not name.startswith("hf:"):
        (tmp_path / name).write_bytes(b"")
        source = str(tmp_path / name)
    assert_names(run, hidden, "train", "prepare", source, "--out", str(tmp_path / "out"))


def test_a_tokenizer_file_needs_tokenizers(run: Shell, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    words = ["prepare", str(tmp_path / "a.txt"), "--tokenizer", "t.json", "--out", str(tmp_path / "out")]
    assert_names(run, "tokenizers", "train", *words)


def test_a_sampler_without_its_package_is_told_likewise(run: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cmaes", None)
    outcome = run("tune", "--device", "cpu", "--seq-len", "128", "--sampler", "cmaes", "--in-process")
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1] == "error: sampler cmaes needs more packages: pip install cmaes"


def test_a_database_without_its_driver_is_told_likewise(run: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymysql", None)
    outcome = run("tune", "--device", "cpu", "--seq-len", "128", "--storage", "mysql+pymysql://user@host/none")
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].endswith("needs a driver: pip install pymysql")
