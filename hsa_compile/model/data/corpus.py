"""A prepared corpus, read from its files: its documents, and windows that a seed and an index alone decide.

A `TrainingSample` is a row to train on; `corpus_sample` makes one of such a window.
"""

import os
import random
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from hsa_compile.errors import CorpusError, InvalidArgument
from hsa_compile.files import check_sha256, open_regular
from hsa_compile.model.data.manifest import (
    MANIFEST,
    SPLITS,
    TOKENIZER_FILE,
    TRAIN,
    ends_name,
    read_manifest,
    tokens_name,
)
from hsa_compile.model.data.tokenizer import BYTES, TokenArray, Tokenizer, load_tokenizer

_BLOCK = 1 << 20  # how many ends of documents are checked at a time


class NumberFile:
    """The numbers in a file, read when they are asked for; a slice gives an array of its own that cannot be written.

    Nothing is mapped, since a file that is cut while it is mapped would end the process instead of raising an error.
    The file stays readable after it was removed or replaced.

    Args:
        path: the file.
        dtype: the dtype of its numbers.
        count: how many there must be.
        limit: the numbers that are read must be below it; None if all of the dtype are allowed.

    Raises:
        CorpusError: the file cannot be read or has another size; a slice raises it too, also for a number that is not
            below the limit.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], count: int, limit: int | None = None) -> None:
        self.path, self.dtype, self._count, self._limit = path, dtype, count, limit
        try:
            self._file = open_regular(path)
        except OSError as error:
            raise CorpusError(f"{path} cannot be read: {error.strerror}") from error
        weakref.finalize(self, os.close, self._file)
        self._check_size()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: slice) -> npt.NDArray[Any]:
        first, last, _ = index.indices(self._count)
        size, data = max(last - first, 0) * self.dtype.itemsize, b""
        try:
            while more := os.pread(self._file, size - len(data), first * self.dtype.itemsize + len(data)):
                data += more  # more than 2 GiB come in parts
        except OSError as error:
            raise CorpusError(f"{self.path} cannot be read: {error.strerror}") from error
        if len(data) < size:
            self._check_size()
        numbers = np.frombuffer(data, self.dtype)
        if self._limit is not None and size and int(numbers.max()) >= self._limit:
            place = first + int(np.flatnonzero(numbers >= self._limit)[0])
            raise CorpusError(
                f"{self.path} is damaged: token {place} is {numbers[place - first]}; the vocabulary has {self._limit}"
            )
        return numbers

    def _check_size(self) -> None:
        size, told = os.fstat(self._file).st_size, self._count * self.dtype.itemsize
        if size != told:
            raise CorpusError(f"{self.path} has {size} bytes, its manifest says {told}; prepare it again")


class TokenCorpus:
    """One split of a prepared corpus; of its files only the ends of documents are read before they are asked for.

    Args:
        directory: the folder that `hsa-compile prepare` wrote.
        split: `train` or `validation`.
        checksum: whether to compare the files with the manifest's SHA-256, which reads them once.

    Attributes:
        tokens: `[num_tokens]` of uint8, uint16 or uint32, read in slices; every document is followed by the separator.

    Raises:
        CorpusError: there is no manifest or it is damaged, or a file is missing, has another size or another checksum,
            or has documents that do not follow each other. Reading raises it if a file was cut meanwhile, or holds a
            token that is not in the vocabulary.
        InvalidArgument: there is no such split.
    """

    def __init__(self, directory: str | Path, *, split: str = TRAIN, checksum: bool = False) -> None:
        if split not in SPLITS:
            raise InvalidArgument(f"split {split!r}; allowed are {', '.join(SPLITS)}")
        self.directory, self.split = Path(directory), split
        self.manifest = read_manifest(self.directory)
        summary, vocab_size = self.manifest.splits[split], self.manifest.vocab_size
        dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        tokens, ends = self.directory / tokens_name(split), self.directory / ends_name(split)
        self.tokens = NumberFile(
            tokens, dtype, summary.tokens, None if vocab_size > np.iinfo(dtype).max else vocab_size
        )  # fmt: skip
        self._ends = NumberFile(ends, np.dtype("<i8"), summary.documents)
        _check_ends(self._ends, summary.tokens, int(self.manifest.separator is not None))
        if checksum:
            source = f"{MANIFEST}; prepare the corpus again"
            check_sha256(tokens, summary.tokens_sha256, source, error=CorpusError)
            check_sha256(ends, summary.ends_sha256, source, error=CorpusError)
        if read_manifest(self.directory) != self.manifest:
            raise CorpusError(f"{self.directory} was prepared anew while it was opened; open it again")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def documents(self) -> "Documents":
        """All documents of the split, in the order of their sources and without separators."""
        return Documents(self.tokens, self._ends, self.manifest.separator is not None)

    def sample(self, index: int, length: int, *, seed: int = 0) -> TokenArray:
        """Returns a random window, the same for the same (seed, index, length) in every process.

        Returns:
            `[length]`, read-only, with documents and their separators as they come.

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
    """The documents of a split as a sequence; each is read when it is asked for."""

    def __init__(self, tokens: NumberFile, ends: NumberFile, has_separator: bool) -> None:
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
        start, end = (0, *self._ends[:1]) if at == 0 else self._ends[at - 1 : at + 1]
        return self._tokens[int(start) : int(end) - self._separators]

    def __iter__(self) -> Iterator[TokenArray]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """How many tokens each document has, `[num_documents]`, without separators."""
        return np.diff(self._ends[:], prepend=np.int64(0)) - self._separators


def _check_ends(ends: NumberFile, num_tokens: int, separators: int) -> None:
    """Checks that each document ends behind the one before, and the last one with the tokens."""
    last = 0
    for start in range(0, len(ends), _BLOCK):
        block = ends[max(start - 1, 0) : start + _BLOCK]
        if block[0] < separators or (np.diff(block) < separators).any():
            raise CorpusError(f"{ends.path} is damaged: a document ends before it begins; prepare the corpus again")
        last = int(block[-1])
    if last != num_tokens:
        raise CorpusError(
            f"{ends.path} is damaged: the last document does not end with the tokens; prepare the corpus again"
        )


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
