"""`hsa-compile prepare` as a person meets it."""

import json
import sys
from pathlib import Path

import pytest

from hsa_compile.cli.main import main
from hsa_compile.model.data.corpus import TokenCorpus


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hsa-compile", "prepare", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text\n")
    (tmp_path / "texts" / "binary").write_bytes(b"\0\1")
    return tmp_path / "texts"


def test_a_summary_counts_documents_and_names_what_was_skipped(run, texts: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = run(texts, "--out", tmp_path / "out", "--validation", 0)
    assert code == 0
    assert "1 documents (1 train, 0 validation), 6 tokens (bytes, uint8)" in out
    assert f"{texts / 'binary'}: binary: holds NUL bytes" in out
    assert len(TokenCorpus(tmp_path / "out", checksum=True).documents) == 1


def test_json_is_the_manifest(run, texts: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, err = run(texts, "--out", tmp_path / "out", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads((tmp_path / "out" / "manifest.json").read_text())


@pytest.mark.slow
def test_the_standard_library_becomes_a_corpus(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = run("--corpus", "stdlib", "--out", tmp_path / "out", "--validation", "0.05")
    assert code == 0
    assert "duplicates left out" in out
    corpus = TokenCorpus(tmp_path / "out")
    assert len(corpus) > 4e6
    assert any(b"class ArgumentParser" in document.tobytes() for document in corpus.documents)
    assert len(TokenCorpus(tmp_path / "out", split="validation").documents) > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.txt"], "source nowhere.txt does not exist"),
        ([], "no source; allowed are"),
        (["--validation", "1.5"], "not in the range"),
        (["--tokenizer", "none.json", "--corpus", "stdlib"], "none.json: No such file"),
    ],
    ids=["missing", "none", "share", "tokenizer"],
)
def test_wrong_input_is_one_line_and_exit_code_2(run, tmp_path: Path, arguments: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    if "--tokenizer" in arguments:
        pytest.importorskip("tokenizers")
    code, _, err = run(*arguments, "--out", tmp_path / "out")
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_missing_package_is_named_with_how_to_install_it(  # type: ignore[no-untyped-def]
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    code, _, err = run(tmp_path / "a.jsonl.zst", "--out", tmp_path / "out")
    assert code == 2
    assert "pip install 'hsa-compile[train]'" in err


def test_a_corpus_without_documents_is_a_failure(run, texts: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, _, err = run(texts / "binary", "--out", tmp_path / "out")
    assert code == 1
    assert "no document in 1 sources" in err
