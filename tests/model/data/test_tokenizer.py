"""Bytes and files as tokenizers."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsa_compile.errors import InvalidArgument, MissingDependency
from hsa_compile.model.data.tokenizer import BytesTokenizer, FileTokenizer, load_tokenizer, token_dtype


@settings(max_examples=25)
@given(st.text())
def test_bytes_come_back_as_the_same_text(text: str) -> None:
    tokenizer = load_tokenizer("bytes")
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.uint8
    assert tokenizer.decode(tokens) == text


def test_bytes_that_are_no_text_are_shown_and_not_an_error() -> None:
    assert BytesTokenizer().decode([104, 105, 255]) == "hi\ufffd"


@pytest.mark.parametrize("token", [-1, 256])
def test_an_id_that_is_no_byte_is_refused(token: int) -> None:
    with pytest.raises(InvalidArgument, match=f"token {token}"):
        BytesTokenizer().decode([65, token])


def test_the_smallest_integers_are_taken() -> None:
    sizes = [token_dtype(size) for size in (256, 257, 2**16, 2**16 + 1)]
    assert sizes == [np.uint8, np.uint16, np.uint16, np.uint32]


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(InvalidArgument, match=r"none\.json: No such file"):
        load_tokenizer(tmp_path / "none.json")


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "t.json").write_text(json.dumps({"no": "tokenizer"}))
    with pytest.raises(InvalidArgument, match=r"t\.json cannot be read"):
        load_tokenizer(tmp_path / "t.json")


def test_without_the_package_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependency, match=r"pip install 'hsa-compile\[train\]'"):
        load_tokenizer(tmp_path / "t.json")


def test_a_file_of_words_encodes_and_decodes(word_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(word_tokenizer)
    tokens = tokenizer.encode("w1 w299 w0")
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [1, 299, 0]
    assert tokenizer.decode(tokens) == "w1 w299 w0"
    assert tokenizer.vocab_size == 302
    assert tokenizer.separator == 301
    assert [item.tolist() for item in tokenizer.encode_batch([b"w1", b"w2 w3"])] == [[1], [2, 3]]


def test_a_file_that_cuts_and_pads_gives_whole_texts(word_tokenizer: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    changed = tokenizers.Tokenizer.from_file(str(word_tokenizer))
    changed.enable_truncation(2)
    changed.enable_padding(length=4)
    changed.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.encode("w1 w2 w3").tolist() == [1, 2, 3]
    assert [item.tolist() for item in tokenizer.encode_batch([b"w1", b"w1 w2 w3"])] == [[1], [1, 2, 3]]


def tokenizer_of(kind: str, path: Path) -> FileTokenizer:
    """A tokenizer whose control tokens are found in text by its table of added tokens, or by its model alone."""
    tokenizers = pytest.importorskip("tokenizers")
    models, split = tokenizers.models, tokenizers.pre_tokenizers
    controls = ["</s>", "<|im_start|>"]
    letters = ["a", "b", "<", ">", "/", "s", "|", "im", "_start", " "]
    if kind == "words":
        vocabulary = {text: number for number, text in enumerate(["[UNK]", *controls, *letters])}
        made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        made.pre_tokenizer = split.WhitespaceSplit()
    elif kind == "pieces":
        made = tokenizers.Tokenizer(models.Unigram([(text, -1.0) for text in ["[UNK]", *controls, *letters]], unk_id=0))
    else:
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = split.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            special_tokens=controls, initial_alphabet=split.ByteLevel.alphabet(), show_progress=False
        )
        made.train_from_iterator(["a </s> b"], trainer)
    made.add_special_tokens(controls)
    made.save(str(path))
    return FileTokenizer(path)


@pytest.mark.parametrize("kind", ["words", "pieces", "bytes"])
def test_the_name_of_a_control_token_in_a_text_is_text(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(kind, tmp_path / "tokenizer.json")
    assert tokenizer.separator is not None
    for text in ("</s>", "a </s> b", "a <|im_start|> </s> </s> b", "<</s>/s>", "a b"):
        for ids in (tokenizer.encode(text), tokenizer.encode_batch([b"a", text.encode()])[1]):
            assert not set(ids.tolist()) & set(tokenizer._controls)
            assert len(ids)
            if kind == "bytes":
                assert tokenizer.decode(ids) == text
    assert tokenizer.encode("a b").tolist() == tokenizer.encode_batch([b"a b"])[0].tolist()
