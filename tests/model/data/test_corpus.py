"""Reading a prepared corpus."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsa_compile.errors import CorpusError, InvalidArgument
from hsa_compile.model.data import corpus as corpus_module
from hsa_compile.model.data.corpus import DocumentOrder, NumberFiles, TokenCorpus
from hsa_compile.model.data.documents import find_sources
from hsa_compile.model.data.prepare import prepare

DOCUMENTS = [f"document {number} " * (number % 7 + 1) for number in range(50)]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS))
    prepare(find_sources([folder / "a.jsonl"]), folder / "out", validation=0.2)
    return folder / "out"


@pytest.fixture
def copy(out: Path, tmp_path: Path) -> Path:
    """That a test may damage."""
    for path in out.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_the_splits_together_hold_every_document(out: Path) -> None:
    train, validation = TokenCorpus(out), TokenCorpus(out, split="validation")
    found = [document.tobytes().decode() for corpus in (train, validation) for document in corpus.documents]
    assert sorted(found) == sorted(DOCUMENTS)
    assert len(train.documents) > len(validation.documents) > 0
    assert train.documents.lengths.tolist() == [len(document) for document in train.documents]


def test_documents_can_be_taken_as_from_a_list(out: Path) -> None:
    documents = TokenCorpus(out).documents
    everything = [document.tobytes() for document in documents]
    assert documents[-1].tobytes() == everything[-1]
    assert [document.tobytes() for document in documents[3:9:2]] == everything[3:9:2]
    with pytest.raises(IndexError):
        documents[len(documents)]


@given(st.integers(0, 2**40), st.integers(1, 500), st.integers(0, 9))
def test_a_window_depends_on_seed_and_index_alone(out: Path, index: int, length: int, seed: int) -> None:
    window = TokenCorpus(out).sample(index, length, seed=seed)
    assert window.shape == (length,)
    assert np.array_equal(window, TokenCorpus(out).sample(index, length, seed=seed))
    assert window.tobytes() in TokenCorpus(out).tokens[:].tobytes()


def test_windows_of_other_seeds_and_indices_differ(out: Path) -> None:
    corpus = TokenCorpus(out)
    windows = {corpus.sample(index, 64, seed=seed).tobytes() for index in range(20) for seed in range(2)}
    assert len(windows) > 30


def test_every_place_can_be_drawn(out: Path) -> None:
    corpus = TokenCorpus(out)
    length = len(corpus) - 2
    assert {corpus.sample(index, length).tobytes() for index in range(50)} == {
        corpus.tokens[start : start + length].tobytes() for start in range(3)
    }


@pytest.mark.parametrize("length", [0, -1, 10**9])
def test_a_length_that_the_split_lacks_is_refused(out: Path, length: int) -> None:
    with pytest.raises(InvalidArgument, match=f"length {length} .*allowed are 1 to"):
        TokenCorpus(out).sample(0, length)


def test_an_unknown_split_is_refused(out: Path) -> None:
    with pytest.raises(InvalidArgument, match="allowed are train, validation"):
        TokenCorpus(out, split="test")


def test_an_empty_split_can_be_opened_and_says_so_when_asked(copy: Path) -> None:
    (copy / "one.txt").write_text("text")
    prepare(find_sources([copy / "one.txt"]), copy / "small", validation=0)
    corpus = TokenCorpus(copy / "small", split="validation")
    assert len(corpus) == len(corpus.documents) == 0
    with pytest.raises(InvalidArgument, match="validation is empty"):
        corpus.sample(0, 1)


def test_a_folder_without_manifest_is_no_corpus(copy: Path) -> None:
    (copy / "manifest.json").unlink()
    with pytest.raises(CorpusError, match="holds no finished corpus"):
        TokenCorpus(copy)


@pytest.mark.parametrize("name", ["train.tokens", "train.ends"])
def test_a_file_of_another_size_is_refused_by_name(copy: Path, name: str) -> None:
    (copy / name).write_bytes((copy / name).read_bytes()[:-1])
    with pytest.raises(CorpusError, match=f"{name} has"):
        TokenCorpus(copy)


@pytest.mark.parametrize("name", ["train.tokens", "train.ends"])
def test_a_changed_byte_is_found_by_the_checksum(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[16] ^= 1
    (copy / name).write_bytes(content)
    TokenCorpus(copy)
    with pytest.raises(CorpusError, match=f"{name} is damaged: its SHA-256 is not the one in manifest.json"):
        TokenCorpus(copy, checksum=True)


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "train.tokens").unlink()
    with pytest.raises(CorpusError, match=r"train\.tokens cannot be read"):
        TokenCorpus(copy)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 99}', '{"format": 1}'])
def test_a_damaged_manifest_is_named(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(CorpusError, match=r"manifest\.json"):
        TokenCorpus(copy)


@pytest.mark.parametrize(
    ("name", "value"),
    [("dtype", "O"), ("dtype", "float64"), ("dtype", ["u1"]), ("vocab_size", "256"), ("separator", 256)],
)
def test_a_field_of_the_manifest_that_is_not_allowed_is_named(copy: Path, name: str, value: object) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, name: value}))
    with pytest.raises(CorpusError, match=rf"manifest\.json is damaged: {name} = "):
        TokenCorpus(copy)


def test_counts_of_other_types_and_deep_json_are_refused(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["splits"]["train"]["tokens"] = -1
    for text in (json.dumps(manifest), "[" * 200_000):
        (copy / "manifest.json").write_text(text)
        with pytest.raises(CorpusError, match=r"manifest\.json"):
            TokenCorpus(copy)


@pytest.mark.parametrize(("place", "end"), [(0, -5), (0, 2**40), (-1, 2**40)])
def test_documents_that_end_outside_of_the_file_are_refused(copy: Path, place: int, end: int) -> None:
    ends = np.fromfile(copy / "train.ends", "<i8")
    ends[place] = end
    ends.tofile(copy / "train.ends")
    with pytest.raises(CorpusError, match=r"train\.ends is damaged"):
        TokenCorpus(copy)


def test_the_tokens_cannot_be_changed(out: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        TokenCorpus(out).sample(0, 10)[0] = 1


def test_a_file_that_is_cut_while_it_is_read_is_an_error_and_no_crash(copy: Path) -> None:
    corpus = TokenCorpus(copy)
    os.truncate(copy / "train.tokens", len(corpus) // 2)
    assert len(corpus.tokens[:9]) == 9
    for read in (lambda: corpus.tokens[-9:], lambda: list(corpus.documents), lambda: corpus.sample(0, len(corpus))):
        with pytest.raises(CorpusError, match=r"train\.tokens has \d+ bytes, its manifest says"):
            read()


def test_a_corpus_that_is_prepared_anew_stays_readable_where_it_is_open(copy: Path) -> None:
    (copy / "other.txt").write_text("Another text. " * 90)
    corpus = TokenCorpus(copy)
    before = [document.tobytes() for document in corpus.documents]
    prepare(find_sources([copy / "other.txt"]), copy, overwrite=True)
    assert [document.tobytes() for document in corpus.documents] == before
    assert len(TokenCorpus(copy)) + len(TokenCorpus(copy, split="validation")) == 90 * 14 + 1


def test_a_corpus_that_is_prepared_anew_while_it_is_opened_is_refused(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    real = corpus_module._check_ends

    def prepared(*arguments: Any) -> None:
        real(*arguments)
        (copy / "manifest.json").write_text(json.dumps({**manifest, "duplicates": 7}))

    monkeypatch.setattr(corpus_module, "_check_ends", prepared)
    with pytest.raises(CorpusError, match="was prepared anew while it was opened"):
        TokenCorpus(copy)


def test_a_token_beyond_the_vocabulary_is_named_before_a_model_sees_it(word_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "w1 w2"}\n{"text": "w299"}\n')
    prepare(find_sources([tmp_path / "a.jsonl"]), tmp_path / "out", tokenizer=word_tokenizer, validation=0)
    tokens = np.fromfile(tmp_path / "out" / "train.tokens", "<u2")
    tokens[1] = 302
    tokens.tofile(tmp_path / "out" / "train.tokens")
    with pytest.raises(CorpusError, match=r"train\.tokens is damaged: token 1 is 302; the vocabulary has 302"):
        TokenCorpus(tmp_path / "out").sample(0, 5)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(sources=7),
        lambda manifest: manifest["sources"][0].pop("path"),
        lambda manifest: manifest["sources"][0].update(skipped={"": -1}),
        lambda manifest: manifest["settings"].update(validation="0.2"),
        lambda manifest: manifest["splits"]["train"].update(more=1),
        lambda manifest: manifest.update(duplicates=float("inf")),
    ],
)
def test_every_field_of_a_manifest_is_checked(copy: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorpusError, match=r"manifest\.json is damaged"):
        TokenCorpus(copy)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documents of `out` in nine folders, each prepared on its own; some have nothing for validation."""
    folder = tmp_path_factory.mktemp("shards")
    for number in range(9):
        source = folder / f"{number}.jsonl"
        source.write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS[number::9]))
        prepare(find_sources([source]), folder / "corpus" / f"shard-{number}", validation=0.2)
    return folder / "corpus"


@pytest.mark.parametrize("split", ["train", "validation"])
def test_shards_are_read_as_one_corpus(shards: Path, out: Path, split: str) -> None:
    corpus, parts = TokenCorpus(shards, split=split, checksum=True), sorted(shards.iterdir())
    each = [TokenCorpus(part, split=split) for part in parts]
    assert corpus.tokens[:].tobytes() == b"".join(part.tokens[:].tobytes() for part in each)
    assert [text.tobytes() for text in corpus.documents] == [text.tobytes() for part in each for text in part.documents]
    whole = TokenCorpus(out, split=split)
    assert sorted(corpus.documents.lengths) == sorted(whole.documents.lengths)
    assert corpus.manifest.splits[split].tokens == len(corpus) == len(whole)
    assert corpus.manifest.splits[split].tokens_sha256 != whole.manifest.splits[split].tokens_sha256
    assert corpus.tokenizer().name == "bytes"


@given(st.integers(0, 10**4), st.integers(0, 10**3))
def test_a_slice_may_reach_over_several_shards(shards: Path, start: int, length: int) -> None:
    tokens = TokenCorpus(shards).tokens
    assert isinstance(tokens, NumberFiles)
    assert tokens[start : start + length].tobytes() == tokens[:].tobytes()[start : start + length]
    assert tokens[start : start + length].dtype == np.uint8


def test_shards_of_other_settings_or_unfinished_ones_are_refused(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("text")
    for name in ("a", "b"):
        shutil.copytree(shards / "shard-0", tmp_path / "corpus" / name)
    prepare(find_sources([tmp_path / "more.txt"]), tmp_path / "corpus" / "c", validation=0.3)
    with pytest.raises(CorpusError, match=r"corpus/c was prepared with other settings than .*corpus/a; the shards"):
        TokenCorpus(tmp_path / "corpus")
    (tmp_path / "corpus" / "c" / "manifest.json").unlink()
    with pytest.raises(CorpusError, match="corpus/c holds no finished corpus"):
        TokenCorpus(tmp_path / "corpus")


def documents_of(tokens: Any) -> list[bytes]:
    return sorted(tokens.tobytes().split(b"\0")[:-1])


def test_each_epoch_has_all_documents_once_in_an_order_of_its_own(shards: Path) -> None:
    corpus = TokenCorpus(shards)
    order, size = DocumentOrder(corpus, seed=3), len(corpus)
    epochs = [order.read(epoch * size, size) for epoch in range(3)]
    expected = sorted(document.tobytes() for document in corpus.documents)
    assert all(documents_of(epoch) == expected for epoch in epochs)
    others = [DocumentOrder(corpus, seed=4).read(0, size), corpus.tokens[:]]
    assert len({tokens.tobytes() for tokens in [*epochs, *others]}) == 5


@given(st.integers(0, 10**5), st.integers(0, 5000))
def test_the_order_can_be_read_from_any_place(shards: Path, place: int, length: int) -> None:
    corpus = TokenCorpus(shards)
    order, size = DocumentOrder(corpus, seed=3), len(corpus)
    first, last = place // size, (place + length) // size
    epochs = np.concatenate([order.read(epoch * size, size) for epoch in range(first, last + 1)])
    start = place - first * size
    assert np.array_equal(DocumentOrder(corpus, seed=3).read(place, length), epochs[start : start + length])


def test_the_order_is_that_of_every_version() -> None:
    assert corpus_module._shuffled(10, "documents 0 0").tolist() == [2, 7, 9, 1, 6, 0, 4, 8, 3, 5]
