"""Preparing a corpus: what is kept, what is left out, and what is left by a run that did not come to its end."""

import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest

from hsa_compile.errors import CorpusError, InvalidArgument
from hsa_compile.model.data import corpus_writer
from hsa_compile.model.data import journal as append_file
from hsa_compile.model.data.corpus import TokenCorpus
from hsa_compile.model.data.corpus_writer import FILES, HASHES, JOURNAL
from hsa_compile.model.data.documents import Source, find_sources
from hsa_compile.model.data.manifest import MANIFEST, Manifest, read_manifest
from hsa_compile.model.data.prepare import prepare


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four text files and one JSONL of 30 lines; no two documents are equal."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number:02}.txt").write_text(f"document {number}\n" * (number + 1))
    lines = (json.dumps({"text": f"line {number} " * 20}) for number in range(30))
    (folder / "lines.jsonl").write_text("\n".join(lines))
    return folder


def files_of(out: Path) -> dict[str, bytes]:
    """What a corpus consists of, once it is whole."""
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".")}


def texts(out: Path, split: str = "train") -> list[bytes]:
    return [document.tobytes() for document in TokenCorpus(out, split=split).documents]


def test_all_documents_are_there_once_and_in_order(folder: Path, tmp_path: Path) -> None:
    manifest = prepare(find_sources([folder]), tmp_path / "out", validation=0)
    assert texts(tmp_path / "out") == [
        *((folder / f"{number:02}.txt").read_bytes() for number in range(4)),
        *(f"line {number} ".encode() * 20 for number in range(30)),
    ]
    assert manifest.documents == 34
    assert manifest.tokens == sum(len(text) + 1 for text in texts(tmp_path / "out"))
    assert set(files_of(tmp_path / "out")) == {MANIFEST, *FILES} - {"hashes"}


def test_equal_documents_are_kept_once_across_sources(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("same")
    (tmp_path / "b.txt").write_text("same")
    (tmp_path / "c.jsonl").write_text('{"text": "same"}\n{"text": "other"}\n{"text": "other"}\n{"text": "same "}\n')
    manifest = prepare(
        find_sources([tmp_path / name for name in ("a.txt", "b.txt", "c.jsonl")]), tmp_path / "o", validation=0
    )
    assert texts(tmp_path / "o") == [b"same", b"other", b"same "]
    assert manifest.duplicates == 3


def test_the_split_of_a_document_depends_on_it_alone(folder: Path, tmp_path: Path) -> None:
    sources = find_sources([folder])
    prepare(sources, tmp_path / "all", validation=0.3)
    prepare(sources[::-2], tmp_path / "half", validation=0.3)
    train, held_out = set(texts(tmp_path / "all")), set(texts(tmp_path / "all", "validation"))
    assert not train & held_out
    assert 4 <= len(held_out) <= 20
    assert set(texts(tmp_path / "half")) < train
    assert set(texts(tmp_path / "half", "validation")) <= held_out


def test_bad_sources_are_named_and_leave_nothing(folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a_binary").write_bytes(b"\x7fELF\0\0")
    (bad / "b_empty.txt").touch()
    (bad / "c_latin.txt").write_bytes("é".encode("latin-1"))
    (bad / "d_long.jsonl").write_text(json.dumps({"text": "x" * 5000}) + '\n{"text": "kept"}\n')
    (bad / "e_vanished.txt").write_text("gone")
    (bad / "f_torn.txt").write_text("first\n" * 300 + "\0")
    sources = find_sources([bad])
    (bad / "e_vanished.txt").unlink()
    manifest = prepare(sources, tmp_path / "out", validation=0, max_document_bytes=1000)
    assert texts(tmp_path / "out") == [b"kept"]
    named = {Path(item["path"]).name: item["examples"] for item in manifest.sources}
    assert named == {
        "a_binary": (("", "binary: holds NUL bytes"),),
        "b_empty.txt": (("", "empty"),),
        "c_latin.txt": (("", "invalid UTF-8"),),
        "d_long.jsonl": (("line 1", "longer than 1000 bytes"),),
        "e_vanished.txt": (("", "vanished"),),
        "f_torn.txt": (("", "binary: holds NUL bytes"),),
    }
    assert manifest.skipped["binary: holds NUL bytes"] == 2


def test_what_a_dropped_source_held_is_taken_back_and_no_duplicate_for_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_writer, "_BATCH_BYTES", 1)  # written before the source breaks off
    (tmp_path / "a.txt").write_bytes(b"x\n" * 30 + b"\0")
    (tmp_path / "b.txt").write_bytes(b"x\n" * 30)
    prepare(find_sources([tmp_path / "a.txt", tmp_path / "b.txt"]), tmp_path / "o", validation=0, max_document_bytes=60)
    assert texts(tmp_path / "o") == [b"x\n" * 30]


def test_without_any_document_there_is_no_corpus(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(CorpusError, match=r"no document in 1 sources: .*empty\.txt: empty"):
        prepare(find_sources([tmp_path / "empty.txt"]), tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_no_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no source"):
        prepare([], tmp_path / "out")


def test_a_tokenizer_file_is_copied_beside_its_tokens(word_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "w1 w2"}\n{"text": "w299"}\n')
    prepare(find_sources([tmp_path / "a.jsonl"]), tmp_path / "out", tokenizer=word_tokenizer, validation=0)
    word_tokenizer.unlink()
    corpus = TokenCorpus(tmp_path / "out", checksum=True)
    assert corpus.tokens[:].tolist() == [1, 2, 301, 299, 301]
    assert corpus.tokens.dtype == np.uint16
    assert [corpus.tokenizer().decode(document) for document in corpus.documents] == ["w1 w2", "w299"]


def in_child(work: Callable[[], object]) -> int:
    """Runs in a forked process and returns how it ended, as `os.waitpid` says."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def killed_after(num_writes: int, sources: list[Source], out: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Prepares in a process that dies within a write, half of which reaches the file; whether it came so far."""
    done = 0

    def write(handle: int, data: memoryview) -> int:
        nonlocal done
        done += 1
        if done > num_writes:
            real(handle, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(handle, data)

    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(append_file.os, "write", write)
        return in_child(lambda: prepare(sources, out)) == signal.SIGKILL


def read_again(sources: list[Source], out: Path, monkeypatch: pytest.MonkeyPatch) -> list[Source]:
    """Goes on, and returns which sources were opened."""
    opened = []

    def read(source: Source, **options: object) -> Iterator[object]:
        opened.append(source)
        return real(source, **options)  # type: ignore[arg-type]

    real = corpus_writer.read_documents
    with monkeypatch.context() as patch:
        patch.setattr(corpus_writer, "read_documents", read)
        prepare(sources, out)
    return opened


def test_killed_within_any_write_the_next_run_makes_the_same_corpus(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = find_sources([folder])
    prepare(sources, tmp_path / "whole")
    num_writes, least = 0, len(sources)
    while killed_after(num_writes, sources, out := tmp_path / f"killed-{num_writes}", monkeypatch):
        with pytest.raises(CorpusError, match="holds no finished corpus"):
            TokenCorpus(out)
        finished = max(len((out / "journal.jsonl").read_text().split("\n")) - 2, 0)
        opened = read_again(sources, out, monkeypatch)
        assert opened == sources[finished:], num_writes
        assert files_of(out) == files_of(tmp_path / "whole"), num_writes
        num_writes, least = num_writes + 1, min(least, len(opened))
    assert num_writes > 2 * len(sources)
    assert least == 1


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_lost_its_end_is_written_anew_from_there(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = find_sources([folder])
    prepare(sources, tmp_path / "whole", validation=0.3)
    out = _unfinished(sources, tmp_path / "out", monkeypatch)
    content = (out / name).read_bytes()
    (out / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # as after a power cut
    prepare(sources, out, validation=0.3)
    assert files_of(out) == files_of(tmp_path / "whole")


def _unfinished(sources: list[Source], out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All sources are read, and then there is no space for the manifest."""

    def fail(folder: Path, manifest: Manifest) -> None:
        raise CorpusError("no space for the manifest")

    with monkeypatch.context() as patch:
        patch.setattr(corpus_writer, "write_manifest", fail)
        with pytest.raises(CorpusError, match="no space"):
            prepare(sources, out, validation=0.3)
    return out


def test_a_source_that_changed_meanwhile_is_read_again_with_all_after_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = _unfinished(find_sources([folder]), tmp_path / "out", monkeypatch)
    (folder / "02.txt").write_text("changed meanwhile")
    sources = find_sources([folder])
    prepare(sources, tmp_path / "whole", validation=0.3)
    prepare(sources, out, validation=0.3)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_an_unfinished_corpus_with_other_settings_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = find_sources([folder])
    out = _unfinished(sources, tmp_path / "out", monkeypatch)
    with pytest.raises(InvalidArgument, match=r"validation 0\.3, not 0\.1"):
        prepare(sources, out, validation=0.1)
    assert prepare(sources, out, validation=0.1, overwrite=True).settings.validation == 0.1


def test_a_finished_corpus_is_not_made_again_and_another_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = find_sources([folder])
    manifest = prepare(sources, tmp_path / "out")
    assert read_again(sources, tmp_path / "out", monkeypatch) == []
    assert read_manifest(tmp_path / "out").splits == manifest.splits
    with pytest.raises(InvalidArgument, match="holds a finished corpus"):
        prepare(sources[:-1], tmp_path / "out")
    with pytest.raises(InvalidArgument, match="holds a finished corpus"):
        prepare(sources, tmp_path / "out", validation=0.5)


def test_a_full_disk_is_named_and_the_run_can_go_on(folder: Path, tmp_path: Path) -> None:
    sources = find_sources([folder])
    prepare(sources, tmp_path / "whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(
            CorpusError, match=r"cannot write .*(train\.tokens|journal\.jsonl): File too large; what was"
        ):
            prepare(sources, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(CorpusError, match="holds no finished corpus"):
        TokenCorpus(tmp_path / "out")
    prepare(sources, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_two_processes_do_not_write_the_same_corpus(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (
        filelock.FileLock(tmp_path / "out" / ".lock"),
        pytest.raises(CorpusError, match="another process prepares"),
    ):
        prepare(find_sources([folder]), tmp_path / "out")


def test_a_process_that_is_told_to_waits_for_the_one_that_writes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with ThreadPoolExecutor(1) as pool:
        with filelock.FileLock(tmp_path / "out" / ".lock"):
            coming = pool.submit(prepare, find_sources([folder]), tmp_path / "out", wait=True)
            assert wait([coming], timeout=0.2).not_done
        coming.result()
    assert len(TokenCorpus(tmp_path / "out"))


def test_progress_comes_to_the_size_of_all_sources(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = find_sources([folder])
    told: list[int] = []
    prepare(sources, tmp_path / "out", on_progress=told.append)
    assert sum(told) == sum(source.size for source in sources)
    _unfinished(sources, tmp_path / "again", monkeypatch)
    told.clear()
    prepare(sources, tmp_path / "again", validation=0.3, on_progress=told.append)
    assert sum(told) == sum(source.size for source in sources)


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: [],
        lambda line: {**line, "examples": 7},
        lambda line: {**line, "crcs": {**line["crcs"], HASHES: "0"}},
        lambda line: {**line, "sizes": {HASHES: 32}},
        lambda line: {**line, "sizes": {"../../etc/passwd": 1}, "crcs": {"../../etc/passwd": 1}},
        lambda line: {**line, "source": {**line["source"], "size": -1}},
        lambda line: {**line, "skipped": {"a": 10**400}},
    ],
)
def test_a_line_of_the_journal_of_another_kind_is_read_again_with_all_after_it(
    damage: Callable[[dict[str, Any]], object], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = find_sources([folder])
    prepare(sources, tmp_path / "whole")
    out = tmp_path / "out"
    assert killed_after(20, sources, out, monkeypatch)
    lines = (out / JOURNAL).read_text().splitlines()
    assert len(lines) > 2
    lines[2] = json.dumps(damage(json.loads(lines[2])))
    (out / JOURNAL).write_text("\n".join(lines) + "\n")
    assert read_again(sources, out, monkeypatch) == sources[1:]
    assert files_of(out) == files_of(tmp_path / "whole")
