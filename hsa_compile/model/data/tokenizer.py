"""From text to token ids and back: by bytes, which need nothing, or by a `tokenizer.json` of Hugging Face's library."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hsa_compile.errors import InvalidArgument
from hsa_compile.versions import require

BYTES = "bytes"
_END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[SEP]")

TokenArray = npt.NDArray[np.unsignedinteger[Any]]


class Tokenizer(Protocol):
    """What a corpus asks of a tokenizer.

    Attributes:
        name: `bytes`, or the file's name.
        digest: SHA-256 of the file, so that a corpus is never read with another tokenizer; for bytes, of their name.
        vocab_size: one more than the largest id.
        separator: the id that stands after each document; None if the tokenizer has none.
    """

    name: str
    digest: str
    vocab_size: int
    separator: int | None

    def encode(self, text: str) -> TokenArray:
        """Returns the ids of a text, without any that mark its beginning or end."""

    def encode_batch(self, texts: Sequence[bytes]) -> list[TokenArray]:
        """Returns the ids of several texts, each in UTF-8."""

    def decode(self, tokens: npt.ArrayLike) -> str:
        """Returns the text of ids; the separator becomes what the tokenizer shows for it."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Returns the smallest unsigned integer type that holds the ids of a vocabulary."""
    if not 1 <= vocab_size <= 2**32:
        raise InvalidArgument(f"vocabulary of {vocab_size}; allowed are 1 to 2^32")
    return np.dtype(np.uint8 if vocab_size <= 2**8 else np.uint16 if vocab_size <= 2**16 else np.uint32)


class BytesTokenizer:
    """A tokenizer whose ids are the 256 UTF-8 bytes; byte 0, which no document may hold, stands between documents."""

    name = BYTES
    digest = BYTES
    vocab_size = 256
    separator: int | None = 0

    def encode(self, text: str) -> TokenArray:
        """Returns the ids of a text, one a byte."""
        return np.frombuffer(text.encode(), np.uint8)

    def encode_batch(self, texts: Sequence[bytes]) -> list[TokenArray]:
        """Returns the bytes themselves, without a copy."""
        return [np.frombuffer(text, np.uint8) for text in texts]

    def decode(self, tokens: npt.ArrayLike) -> str:
        """Returns the text of ids; bytes that are no UTF-8, as a model may write them, become U+FFFD.

        Raises:
            InvalidArgument: an id is outside 0 … 255.
        """
        ids = np.asarray(tokens)
        if ids.size and (ids.min() < 0 or ids.max() > 255):
            raise InvalidArgument(f"token {ids.max() if ids.max() > 255 else ids.min()}; bytes are 0 to 255")
        return ids.astype(np.uint8).tobytes().decode(errors="replace")


class FileTokenizer:
    """A `tokenizer.json` as Hugging Face's `tokenizers` writes it.

    Raises:
        InvalidArgument: the file does not exist or is no tokenizer.
        MissingDependency: `tokenizers` is not installed.
    """

    def __init__(self, path: Path) -> None:
        tokenizers = require("tokenizers", "a tokenizer.json")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InvalidArgument(
                f"tokenizer {path}: {error.strerror}; allowed are bytes and a tokenizer.json"
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except ValueError as error:
            raise InvalidArgument(f"tokenizer {path} cannot be read: {error}") from error
        # Published files often carry both for the model that they came with; a corpus wants whole texts, and no more.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.name = path.name
        self.content = content
        self.digest = hashlib.sha256(content).hexdigest()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=0) + 1
        self.separator: int | None = next((vocabulary[name] for name in _END_OF_DOCUMENT if name in vocabulary), None)
        self._dtype = token_dtype(self.vocab_size)

    def encode(self, text: str) -> TokenArray:
        """Returns the ids of a text, without special tokens around it."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, self._dtype)

    def encode_batch(self, texts: Sequence[bytes]) -> list[TokenArray]:
        """Returns the ids of several texts, computed by all cores."""
        found = self._tokenizer.encode_batch([text.decode() for text in texts], add_special_tokens=False)
        return [np.array(item.ids, self._dtype) for item in found]

    def decode(self, tokens: npt.ArrayLike) -> str:
        """Returns the text of ids, with special tokens among them."""
        return str(self._tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=False))


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Loads the tokenizer that a person named: `bytes`, or the path of a `tokenizer.json`."""
    return BytesTokenizer() if str(spec) == BYTES else FileTokenizer(Path(spec))
