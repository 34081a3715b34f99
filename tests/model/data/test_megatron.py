"""Megatron's pairs of files, written by hand after the published format: what they give, and what damage is told."""

import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from hsa_compile.errors import CorpusError, UnreadableSource
from hsa_compile.model.data import megatron
from hsa_compile.model.data.corpus import TokenCorpus
from hsa_compile.model.data.documents import MEGATRON, Skipped, find_sources, read_documents
from hsa_compile.model.data.prepare import prepare

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}


def index(lengths: Sequence[int], ends: Sequence[int], *, itemsize: int = 2, code: int = 8, version: int = 1) -> bytes:
    """An index; `ends` names the first sequence of each document, and that behind the last one."""
    begins = itemsize * np.concatenate(([0], np.cumsum(lengths)[:-1])) if len(lengths) else []
    return b"".join((
        b"MMIDIDX\x00\x00", struct.pack("<QBQQ", version, code, len(lengths), len(ends)),
        np.asarray(lengths, "<i4").tobytes(), np.asarray(begins, "<i8").tobytes(), np.asarray(ends, "<i8").tobytes(),
    ))  # fmt: skip


def written(folder: Path, documents: Sequence[Sequence[Sequence[int]]], dtype: str = "uint16") -> Path:
    """Documents, each of some sequences of ids."""
    sequences = [np.asarray(sequence, dtype) for document in documents for sequence in document]
    ends = np.cumsum([0, *map(len, documents)]).tolist()
    (folder / "a.bin").write_bytes(b"".join(sequence.tobytes() for sequence in sequences))
    sizes = [len(sequence) for sequence in sequences]
    (folder / "a.idx").write_bytes(index(sizes, ends, itemsize=np.dtype(dtype).itemsize, code=CODES[dtype]))
    return folder / "a.idx"


def read(path: Path, max_bytes: int = 1 << 20) -> list[object]:
    (source,) = find_sources([path])
    assert source.kind == MEGATRON
    items = read_documents(source, max_bytes=max_bytes)
    return [item if isinstance(item, Skipped) else np.asarray(item).tolist() for item in items]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
def test_documents_are_the_ids_of_their_sequences(dtype: str, tmp_path: Path) -> None:
    path = written(tmp_path, [[[1, 2], [3]], [[4]], [[5, 6, 7]]], dtype)
    assert read(path) == read(tmp_path / "a.bin") == [[1, 2, 3], [4], [5, 6, 7]]


def test_documents_of_many_blocks_follow_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron, "_BLOCK", 3)
    documents = [[[n] * (1 + n % 3), [n, n]] for n in range(11)]
    expected = [[n] * (3 + n % 3) for n in range(11)]
    assert read(written(tmp_path, documents)) == expected


def test_a_pair_in_a_folder_is_one_source_that_changes_with_either_file(tmp_path: Path) -> None:
    path = written(tmp_path, [[[1, 2]]])
    (source,) = before = find_sources([tmp_path, path, tmp_path / "a.bin"])
    assert source.size == path.stat().st_size + 4
    (tmp_path / "a.bin").write_bytes(b"\1\0\3\0\0\0")
    assert find_sources([tmp_path]) != before


def test_long_and_empty_documents_are_skipped_and_named(tmp_path: Path) -> None:
    path = written(tmp_path, [[[1] * 9], [[]], [[2]]])
    long = Skipped(reason="longer than 16 bytes", where="document 1")
    assert read(path, max_bytes=16) == [long, Skipped(reason="empty document", where="document 2"), [2]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xfftOc\0\0\0\2", "does not begin with MMIDIDX"),
        (index([2], [0, 1])[:30], "does not begin with MMIDIDX"),
        (index([2], [0, 1], version=2), "version 2 .*; 1 can be read"),
        (index([2], [0, 1], code=7), r"dtype 7 \(float32\); allowed are 1 \(uint8\)"),
        (index([2], [0, 1], code=9), r"dtype 9 \(unknown\)"),
        (index([2], [0, 1])[:-1], "has 61 bytes; 1 sequences and 2 document ends take 62"),
        (index([2], [0, 1]) + b"\0", "has 63 bytes"),
        (index([2], [1, 1]), "documents 0 … 1 do not follow"),
        (index([1, 1], [0, 2, 1]), "documents 0 … 2 do not follow"),
        (index([1, 1], [0, 3]), "do not follow"),
        (index([2], [0, -(2**63), 2**63 - 1, 1]), "do not follow"),
        (index([1, 1], [0, 1]), "documents have 1 sequences, and it has 2"),
        (index([2], []), "documents have 0 sequences, and it has 1"),
        (index([2], [0, 1], itemsize=2, code=4), "has 4 bytes; the index speaks of 8"),
        (index([1], [0, 1]), "has 4 bytes; the index speaks of 2"),
        (index([-1, 3], [0, 2]), "sequence 0 has -1 ids"),
        (index([1, 1], [0, 2], itemsize=4), "sequence 1 has 1 ids from byte 4 on; the one before it ends at byte 2"),
        (index([], [0]), "has 4 bytes; the index speaks of 0"),
    ],
)
def test_damage_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\1\0\2\0")
    (tmp_path / "a.idx").write_bytes(content)
    with pytest.raises(UnreadableSource, match=message):
        read(tmp_path / "a.idx")


def test_negative_ids_and_a_missing_half_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableSource, match="document 2 holds the id -5"):
        read(written(tmp_path, [[[1]], [[2, -5]]], "int32"))
    (tmp_path / "a.bin").unlink()
    with pytest.raises(UnreadableSource, match=r"there is no a\.bin beside it"):
        read(tmp_path / "a.idx")


def test_a_corpus_of_ids_is_that_of_the_text(word_tokenizer: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    ids: list[list[list[int]]] = []
    for number in range(6):
        (texts / f"{number}.txt").write_text(f"w{number} w{number + 1} w299")
        ids.append([[number, number + 1, 299, 301]])  # 301 is the separator, as `--append-eod` adds it
    pair = written(tmp_path, [*ids, ids[0], [[301]]])
    options = {"tokenizer": word_tokenizer, "validation": 0.0}
    prepare(find_sources([texts]), tmp_path / "of_text", **options)  # type: ignore[arg-type]
    manifest = prepare(find_sources([pair]), tmp_path / "of_ids", **options)  # type: ignore[arg-type]
    expected, found = (TokenCorpus(tmp_path / name, checksum=True) for name in ("of_text", "of_ids"))
    assert found.tokens[:].tolist() == expected.tokens[:].tolist()
    assert found.documents.lengths.tolist() == expected.documents.lengths.tolist() == [3] * 6
    assert (manifest.duplicates, manifest.skipped) == (1, {"empty document": 1})


def test_ids_of_another_tokenizer_are_refused_by_name(tmp_path: Path) -> None:
    pair = written(tmp_path, [[[7]], [[256]]])
    with pytest.raises(CorpusError, match=r"a\.idx: token 256; the tokenizer bytes has 256 ids"):
        prepare(find_sources([pair]), tmp_path / "out")


@pytest.fixture
def saved() -> Callable[[Path], None]:
    """Writes a data set with two splits as Hugging Face's library does."""
    datasets = pytest.importorskip("datasets")

    def save(folder: Path) -> None:
        rows = datasets.Dataset.from_dict({"n": [1, 2, 3], "text": ["one", "two", None]})
        datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(folder)

    return save


@pytest.mark.slow
def test_a_saved_data_set_gives_its_rows_and_not_what_describes_it(
    saved: Callable[[Path], None], tmp_path: Path
) -> None:
    saved(tmp_path / "set")
    test, train = find_sources([tmp_path / "set"])
    skipped = Skipped(reason="no string in field 'text'", where="row 3")
    assert list(read_documents(train)) == [b"one", b"two", skipped]
    assert list(read_documents(test)) == [b"two"]
    with pytest.raises(UnreadableSource, match="no column 'body'; there are n, text"):
        list(read_documents(train, field="body"))
    Path(train.path).write_bytes(Path(train.path).read_bytes()[:300])
    with pytest.raises(UnreadableSource, match="damaged Arrow"):
        list(read_documents(train))
