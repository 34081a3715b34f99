"""From text to token ids and back: by bytes, which need nothing, or by a `tokenizer.json` of Hugging Face's library."""

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hsa_compile.checks import one_line
from hsa_compile.errors import InvalidArgument
from hsa_compile.files import read_regular
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

    Text is text: where it holds the name of a control token, such as `<|endoftext|>`, the name is cut after its first
    character and encoded as two texts, so that nobody who writes a document can end it, or speak for somebody else.

    Raises:
        InvalidArgument: the file does not exist or is no tokenizer.
        MissingDependency: `tokenizers` is not installed.
    """

    def __init__(self, path: Path) -> None:
        tokenizers = require("tokenizers", "a tokenizer.json")
        try:
            content = read_regular(path)
        except OSError as error:
            raise InvalidArgument(
                f"tokenizer {path}: {error.strerror or error}; allowed are bytes and a tokenizer.json"
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except ValueError as error:
            raise InvalidArgument(f"tokenizer {path} cannot be read: {one_line(error)}") from error
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
        self._controls = self._control_tokens()

    def encode(self, text: str) -> TokenArray:
        """Returns the ids of a text, without special tokens around it."""
        return self._plain(text, self._tokenizer.encode(text, add_special_tokens=False))

    def encode_batch(self, texts: Sequence[bytes]) -> list[TokenArray]:
        """Returns the ids of several texts, computed by all cores."""
        words = [text.decode() for text in texts]
        found = self._tokenizer.encode_batch(words, add_special_tokens=False)
        return [self._plain(text, item) for text, item in zip(words, found, strict=True)]

    def decode(self, tokens: npt.ArrayLike) -> str:
        """Returns the text of ids, with special tokens among them."""
        return str(self._tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=False))

    def _plain(self, text: str, encoding: Any) -> TokenArray:
        """Returns the ids of an encoding of a text, or of the parts of the text where it gave control tokens."""
        ids = np.array(encoding.ids, self._dtype)
        spans = (encoding.offsets[place] for place in np.flatnonzero(np.isin(ids, self._controls)))
        cuts = [first + 1 for first, last in spans if last - first > 1]
        if not cuts:
            return ids
        return np.concatenate([self.encode(text[a:b]) for a, b in itertools.pairwise([0, *cuts, len(text)])])

    def _control_tokens(self) -> list[int]:
        """Returns the ids that no text may give: the separator, and special tokens but that of what is unknown."""
        added = self._tokenizer.get_added_tokens_decoder()
        special: set[int | None] = {number for number, token in added.items() if token.special}
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        special = special - {self._tokenizer.token_to_id(unknown) if unknown else None} | {self.separator}
        return sorted(number for number in special if number is not None)


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Loads the tokenizer that a person named: `bytes`, or the path of a `tokenizer.json`."""
    return BytesTokenizer() if str(spec) == BYTES else FileTokenizer(Path(spec))
