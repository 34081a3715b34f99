"""What each kind of source gives, and what happens to a bad one."""

import gzip
import json
from pathlib import Path

import pytest

from hsa_compile.errors import UnreadableSource
from hsa_compile.model.data.documents import HUB, Skipped, Source, kind_of, read_documents


def read(path: Path, **options: object) -> list[bytes | Skipped]:
    return list(read_documents(Source(path=str(path), kind=kind_of(path)), **options))  # type: ignore[arg-type]


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def jsonl(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    assert read(written(tmp_path / "a.txt", b"one\ntwo\n")) == [b"one\ntwo\n"]


def test_text_without_a_last_line_end_is_kept_whole(tmp_path: Path) -> None:
    assert read(written(tmp_path / "a.txt", "é".encode())) == ["é".encode()]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b"abc\0def", "binary"), (b"fine\n\xff\xfe\n", "invalid UTF-8")],
    ids=["empty", "binary", "invalid UTF-8"],
)
def test_a_bad_text_file_is_not_used_at_all(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(UnreadableSource, match=reason):
        read(written(tmp_path / "a.txt", content))


def test_a_vanished_file_is_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(UnreadableSource, match="vanished"):
        read(tmp_path / "gone.txt")


def test_a_folder_in_place_of_a_file_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UnreadableSource, match="Is a directory"):
        read(tmp_path)


def test_a_file_of_blanks_holds_no_document(tmp_path: Path) -> None:
    assert read(written(tmp_path / "a.txt", b" \n\n")) == [Skipped(reason="empty document")]


def test_text_above_the_limit_is_cut_at_line_ends(tmp_path: Path) -> None:
    lines = [b"%03d\n" % number for number in range(100)]
    found = read(written(tmp_path / "a.txt", b"".join(lines)), max_bytes=50)
    assert all(isinstance(item, bytes) and len(item) <= 50 and item.endswith(b"\n") for item in found)
    assert found == [b"".join(lines[start : start + 12]) for start in range(0, 100, 12)]


@pytest.mark.parametrize("end", [b"\nlast\n", b"\n", b""], ids=["in between", "at the end", "no line end"])
def test_a_line_above_the_limit_is_skipped_and_named_and_the_rest_is_kept(tmp_path: Path, end: bytes) -> None:
    found = read(written(tmp_path / "a.txt", b"first\n" + b"x" * 1000 + end), max_bytes=64)
    skipped = Skipped(reason="longer than 64 bytes", where="line 2")
    assert found == [b"first\n", skipped, *([b"last\n"] if b"last" in end else [])]


def test_a_line_of_exactly_the_limit_is_kept(tmp_path: Path) -> None:
    assert read(written(tmp_path / "a.txt", b"x" * 63 + b"\n"), max_bytes=64) == [b"x" * 63 + b"\n"]


@pytest.mark.slow
def test_a_line_of_200_mb_needs_no_200_mb(tmp_path: Path) -> None:
    import tracemalloc

    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "')
        for _ in range(200):
            file.write(b"x" * 2**20)
        file.write(b'"}\n' + jsonl({"text": "after"}))
    tracemalloc.start()
    found = read(tmp_path / "a.jsonl", max_bytes=2**20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [Skipped(reason=f"longer than {2**20} bytes", where="line 1"), b"after"]
    assert peak < 8 * 2**20


def test_of_jsonl_bad_lines_are_skipped_and_named(tmp_path: Path) -> None:
    good = jsonl({"text": "one"}, {"text": 5}, {"other": "x"}, ["text"], {"text": "a\0b"}, {"text": "\ud800"})
    found = read(written(tmp_path / "a.jsonl", good + b'{"text": \n\n\xff\n' + jsonl({"text": " "}, {"text": "two"})))
    documents = [item for item in found if isinstance(item, bytes)]
    skipped = [(item.where, item.reason) for item in found if isinstance(item, Skipped)]
    assert documents == [b"one", b"two"]
    assert skipped == [
        ("line 2", "no string in field 'text'"),
        ("line 3", "no string in field 'text'"),
        ("line 4", "no string in field 'text'"),
        ("line 5", "binary: holds NUL bytes"),
        ("line 6", "lone surrogate"),
        ("line 7", "no JSON"),
        ("line 9", "invalid UTF-8"),
        ("line 10", "empty document"),
    ]


def test_another_field_can_hold_the_text(tmp_path: Path) -> None:
    assert read(written(tmp_path / "a.ndjson", jsonl({"body": "x"})), field="body") == [b"x"]


def test_gzip_is_unpacked(tmp_path: Path) -> None:
    assert read(written(tmp_path / "a.jsonl.gz", gzip.compress(jsonl({"text": "x"})))) == [b"x"]
    assert read(written(tmp_path / "a.txt.gz", gzip.compress(b"text"))) == [b"text"]


@pytest.mark.parametrize("damage", [lambda packed: packed[:-20], lambda packed: b"no gzip" + packed])
def test_a_damaged_gzip_is_not_used_at_all(tmp_path: Path, damage: object) -> None:
    packed = gzip.compress(jsonl(*({"text": str(number)} for number in range(100))))
    with pytest.raises(UnreadableSource, match="damaged archive"):
        read(written(tmp_path / "a.jsonl.gz", damage(packed)))  # type: ignore[operator]


def test_zstandard_is_unpacked_and_a_damaged_one_is_not_used(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    packed = zstandard.compress(jsonl({"text": "x"})) + zstandard.compress(jsonl({"text": "second frame"}))
    assert read(written(tmp_path / "a.jsonl.zst", packed)) == [b"x", b"second frame"]
    with pytest.raises(UnreadableSource, match="damaged archive"):
        read(written(tmp_path / "b.jsonl.zst", b"no frame at all"))


@pytest.mark.slow
def test_parquet_gives_a_document_a_row(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None, "", "long" * 20, "two"], "n": [1, 2, 3, 4, 5]}), path)
    assert read(path, max_bytes=64) == [
        b"one",
        Skipped(reason="no string in field 'text'", where="row 2"),
        Skipped(reason="empty document", where="row 3"),
        Skipped(reason="longer than 64 bytes", where="row 4"),
        b"two",
    ]
    with pytest.raises(UnreadableSource, match="no column 'body'; there are text, n"):
        read(path, field="body")
    with pytest.raises(UnreadableSource, match="damaged Parquet"):
        read(written(tmp_path / "b.parquet", b"PAR1 nonsense"))


def test_a_data_set_of_the_hub_is_read_by_its_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"train": [{"text": "one"}], "test": [{"text": "two"}, {"text": 3}]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, streaming: rows[split])
    assert list(read_documents(Source(path="name", kind=HUB))) == [b"one"]
    skipped = Skipped(reason="no string in field 'text'", where="row 2")
    assert list(read_documents(Source(path="name@test", kind=HUB))) == [b"two", skipped]


def test_progress_counts_the_bytes_on_disk(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl.gz", gzip.compress(jsonl(*({"text": "x" * 100} for _ in range(1000)))))
    told: list[int] = []
    read(path, on_progress=told.append)
    assert sum(told) == path.stat().st_size
