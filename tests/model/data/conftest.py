"""A small tokenizer file, made anew."""

from pathlib import Path

import pytest


@pytest.fixture
def word_tokenizer(tmp_path: Path) -> Path:
    """300 words `w0` … `w299`, an unknown one, and a separator."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"w{number}": number for number in range(300)} | {"[UNK]": 300, "</s>": 301}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path / "words.json"
    tokenizer.save(str(path))
    return path
