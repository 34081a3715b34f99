"""A prepared corpus, mapped into memory: its documents, and windows that a seed and an index alone decide.

A `TrainingSample` is a row to train on; `corpus_sample` makes one of such a window.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from hsa_compile.errors import CorpusError, InvalidArgument
from hsa_compile.files import file_sha256
from hsa_compile.model.data.manifest import (
    SPLITS,
    TOKENIZER_FILE,
    TRAIN,
    ends_name,
    read_manifest,
    tokens_name,
)
from hsa_compile.model.data.tokenizer import BYTES, TokenArray, Tokenizer, load_tokenizer

_BLOCK = 1 << 20  # how many ends of documents are checked at a time


class TokenCorpus:
    """One split of a prepared corpus; of its files only the ends of documents are read before they are asked for.

    Args:
        directory: the folder that `hsa-compile prepare` wrote.
        split: `train` or `validation`.
        checksum: whether to compare the files with the manifest's SHA-256, which reads them once.

    Attributes:
        tokens: `[num_tokens]` of uint8, uint16 or uint32, read-only; every document is followed by the separator.

    Raises:
        CorpusError: there is no manifest or it is damaged, or a file is missing, has another size or another checksum,
            or has documents that do not follow each other.
        InvalidArgument: there is no such split.
    """

    def __init__(self, directory: str | Path, *, split: str = TRAIN, checksum: bool = False) -> None:
        if split not in SPLITS:
            raise InvalidArgument(f"split {split!r}; allowed are {', '.join(SPLITS)}")
        self.directory, self.split = Path(directory), split
        self.manifest = read_manifest(self.directory)
        summary = self.manifest.splits[split]
        dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        tokens, ends = self.directory / tokens_name(split), self.directory / ends_name(split)
        self.tokens: TokenArray = _mapped(tokens, dtype, summary.tokens)
        self._ends: npt.NDArray[np.int64] = _mapped(ends, np.dtype("<i8"), summary.documents)
        _check_ends(ends, self._ends, summary.tokens, int(self.manifest.separator is not None))
        if checksum:
            _check(tokens, summary.tokens_sha256)
            _check(ends, summary.ends_sha256)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def documents(self) -> "Documents":
        """All documents of the split, in the order of their sources and without separators."""
        return Documents(self.tokens, self._ends, self.manifest.separator is not None)

    def sample(self, index: int, length: int, *, seed: int = 0) -> TokenArray:
        """Returns a random window, the same for the same (seed, index, length) in every process.

        Returns:
            `[length]`, a view of the file, with documents and their separators as they come.

        Raises:
            InvalidArgument: the split has fewer tokens.
        """
        if not 1 <= length <= len(self.tokens):
            allowed = f"1 to {len(self.tokens)}" if len(self.tokens) else f"none: {self.split} is empty"
            raise InvalidArgument(f"length {length} in {self.directory}; allowed are {allowed}")
        start = random.Random(f"window {seed} {index}").randrange(len(self.tokens) - length + 1)
        return self.tokens[start : start + length]

    def tokenizer(self) -> Tokenizer:
        """Loads the tokenizer that the corpus was prepared with.

        Raises:
            CorpusError: the tokenizer's file is not the same any more.
        """
        settings = self.manifest.settings
        is_bytes = settings.tokenizer_digest == BYTES
        found = load_tokenizer(BYTES if is_bytes else self.directory / TOKENIZER_FILE)
        if found.digest != settings.tokenizer_digest:
            raise CorpusError(f"{self.directory / TOKENIZER_FILE} is not the tokenizer of this corpus")
        return found


class Documents(Sequence[TokenArray]):
    """The documents of a split as a sequence of views."""

    def __init__(self, tokens: TokenArray, ends: npt.NDArray[np.int64], has_separator: bool) -> None:
        self._tokens, self._ends, self._separators = tokens, ends, int(has_separator)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> TokenArray: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenArray]: ...
    def __getitem__(self, index: int | slice) -> TokenArray | list[TokenArray]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        start = int(self._ends[at - 1]) if at else 0
        return self._tokens[start : int(self._ends[at]) - self._separators]

    def __iter__(self) -> Iterator[TokenArray]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """How many tokens each document has, `[num_documents]`, without separators."""
        return np.diff(self._ends, prepend=np.int64(0)) - self._separators


def _mapped(path: Path, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    try:
        size = path.stat().st_size
        if size != count * dtype.itemsize:
            raise CorpusError(f"{path} has {size} bytes, its manifest says {count * dtype.itemsize}; prepare it again")
        return np.memmap(path, dtype, mode="r") if count else np.empty(0, dtype)
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}") from error


def _check_ends(path: Path, ends: npt.NDArray[np.int64], num_tokens: int, separators: int) -> None:
    """Checks that each document ends behind the one before, and the last one with the tokens."""
    for start in range(0, len(ends), _BLOCK):
        block = ends[max(start - 1, 0) : start + _BLOCK]
        if block[0] < separators or (np.diff(block) < separators).any():
            raise CorpusError(f"{path} is damaged: a document ends before it begins; prepare the corpus again")
    if (int(ends[-1]) if len(ends) else 0) != num_tokens:
        raise CorpusError(
            f"{path} is damaged: the last document does not end with the tokens; prepare the corpus again"
        )


def _check(path: Path, sha256: str) -> None:
    if file_sha256(path) != sha256:
        raise CorpusError(f"{path} is not what its manifest describes (SHA-256); prepare it again")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingSample:
    """One row to train on.

    Attributes:
        tokens: `[length]`, unsigned integers.
        loss_weights: `[length]` float32, what the prediction of `tokens[i]` from `tokens[:i]` counts in the loss;
            that of the first token is 0.
        answer_spans: (start, end) of the answers to questions; none in plain text.
    """

    tokens: npt.NDArray[np.unsignedinteger[Any]]
    loss_weights: npt.NDArray[np.float32]
    answer_spans: tuple[tuple[int, int], ...] = ()


def corpus_sample(corpus: TokenCorpus, *, length: int, seed: int, index: int, weight: float = 1.0) -> TrainingSample:
    """Makes a row of a window of plain text; all its tokens but the first count the same."""
    loss_weights = np.full(length, weight, np.float32)
    loss_weights[0] = 0
    return TrainingSample(tokens=corpus.sample(index, length, seed=seed), loss_weights=loss_weights)
