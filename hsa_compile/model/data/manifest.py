"""What a prepared corpus says about itself. It is written last: a folder without it holds no corpus."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hsa_compile.checks import check_choice, check_count
from hsa_compile.errors import CorpusError
from hsa_compile.files import read_regular, write_whole
from hsa_compile.model.data.journal import Settings
from hsa_compile.model.data.tokenizer import token_dtype

MANIFEST = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
FORMAT = 1
TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSummary:
    """One split's counts, and the SHA-256 of its two files."""

    documents: int
    tokens: int
    tokens_sha256: str
    ends_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A prepared corpus, described.

    Attributes:
        settings: the settings that it was prepared with.
        vocab_size: the size of the tokenizer's vocabulary.
        separator: the id after each document; None if there is none.
        dtype: the dtype of the token files, little endian: `uint8`, `uint16` or `uint32`.
        splits: the counts of `train` and of `validation`.
        duplicates: how many documents were left out because an earlier one is equal.
        skipped: how many parts of sources were left out, by reason.
        sources: one dictionary a source: path, kind, size, modified_ns, documents, duplicates, skipped, examples.
        format: the version of the layout.
    """

    settings: Settings
    vocab_size: int
    separator: int | None
    dtype: str
    splits: dict[str, SplitSummary]
    duplicates: int
    skipped: dict[str, int]
    sources: list[dict[str, Any]]
    format: int = FORMAT

    @property
    def documents(self) -> int:
        """How many documents both splits have."""
        return sum(split.documents for split in self.splits.values())

    @property
    def tokens(self) -> int:
        """How many tokens both splits have, separators included."""
        return sum(split.tokens for split in self.splits.values())


def tokens_name(split: str) -> str:
    """Returns the name of the file of a split's tokens."""
    return f"{split}.tokens"


def ends_name(split: str) -> str:
    """Returns the name of the file that says where each document of a split ends: int64, in tokens, with separators."""
    return f"{split}.ends"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest whole or not at all.

    Raises:
        CorpusError: the disk is full, or the folder cannot be written.
    """
    try:
        write_whole(folder / MANIFEST, json.dumps(asdict(manifest), indent=1).encode())
    except OSError as error:
        raise CorpusError(f"cannot write {folder / MANIFEST}: {error.strerror}") from error


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a prepared corpus.

    Raises:
        CorpusError: there is no manifest, so nothing was prepared, or not to its end; or it cannot be read.
    """
    path = folder / MANIFEST
    try:
        found = json.loads(read_regular(path))
    except FileNotFoundError as error:
        raise CorpusError(
            f"{folder} holds no finished corpus: there is no {MANIFEST}; run hsa-compile prepare … --out {folder}"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CorpusError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise CorpusError(f"{path} has another format than {FORMAT}; prepare the corpus again")
    try:
        splits = {name: SplitSummary(**found["splits"][name]) for name in SPLITS}
        manifest = Manifest(**{**found, "settings": Settings(**found["settings"]), "splits": splits})
    except (KeyError, TypeError) as error:
        raise CorpusError(f"{path} lacks or has a field too many: {error}") from error
    try:
        _check(manifest)
    except CorpusError as error:
        raise CorpusError(f"{path}: {error}") from error
    return manifest


def _check(manifest: Manifest) -> None:
    """Checks what numpy and the file system are told."""
    check_count("vocab_size", manifest.vocab_size, 1, 2**32, error=CorpusError)
    check_choice("dtype", manifest.dtype, (token_dtype(manifest.vocab_size).name,), error=CorpusError)
    if manifest.separator is not None:
        check_count("separator", manifest.separator, 0, manifest.vocab_size - 1, error=CorpusError)
    for name, split in manifest.splits.items():
        check_count(f"{name}.documents", split.documents, 0, 2**62, error=CorpusError)
        check_count(f"{name}.tokens", split.tokens, 0, 2**62, error=CorpusError)
    for what, value in (
        *((f"{name}.{file}_sha256", getattr(split, f"{file}_sha256"))
          for name, split in manifest.splits.items() for file in ("tokens", "ends")),
        ("settings.tokenizer", manifest.settings.tokenizer),
        ("settings.tokenizer_digest", manifest.settings.tokenizer_digest),
    ):  # fmt: skip
        if not isinstance(value, str):
            raise CorpusError(f"{what} = {value!r} must be a text")
