"""What a prepared corpus says about itself. It is written last: a folder without it holds no corpus."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from hsa_compile.checks import check_choice, check_count, check_text, from_mapping, shown
from hsa_compile.errors import CorpusError, InvalidArgument
from hsa_compile.files import parse_json, read_regular, write_whole
from hsa_compile.model.data.documents import Source
from hsa_compile.model.data.journal import MOST, Settings, check_found
from hsa_compile.model.data.tokenizer import token_dtype

MANIFEST = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
FORMAT = 1
TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)
_FOUND = ("documents", "duplicates", "skipped", "examples")  # what a source has beside the fields of `Source`


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSummary:
    """One split's counts, and the SHA-256 of its two files."""

    documents: int
    tokens: int
    tokens_sha256: str
    ends_sha256: str

    def __post_init__(self) -> None:
        for name in ("documents", "tokens"):
            check_count(name, getattr(self, name), 0, MOST)
        for name in ("tokens_sha256", "ends_sha256"):
            check_text(name, getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Splits:
    train: object
    validation: object


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

    def __post_init__(self) -> None:
        check_count("vocab_size", self.vocab_size, 1, 2**32)
        check_choice("dtype", self.dtype, (token_dtype(self.vocab_size).name,))
        if self.separator is not None:
            check_count("separator", self.separator, 0, self.vocab_size - 1)
        if not isinstance(self.sources, list):
            raise InvalidArgument(f"sources = {shown(self.sources)} must be a list")
        for source in self.sources:
            _check_source(source)
        check_found(sum(split.documents for split in self.splits.values()), self.duplicates, self.skipped, [])

    @property
    def documents(self) -> int:
        """How many documents both splits have."""
        return sum(split.documents for split in self.splits.values())

    @property
    def tokens(self) -> int:
        """How many tokens both splits have, separators included."""
        return sum(split.tokens for split in self.splits.values())


def _check_source(values: object) -> None:
    if not isinstance(values, dict):
        raise InvalidArgument(f"a source is {shown(values)}, not an object")
    found = {name: values.get(name) for name in _FOUND}
    check_found(**found)
    source = {name: value for name, value in values.items() if name not in _FOUND}
    if missing := [field.name for field in fields(Source) if field.name not in source]:
        raise InvalidArgument(f"a source lacks {', '.join(missing)}")
    from_mapping(Source, source)


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
        found = parse_json(read_regular(path))
    except FileNotFoundError as error:
        raise CorpusError(
            f"{folder} holds no finished corpus: there is no {MANIFEST}; run hsa-compile prepare … --out {folder}"
        ) from error
    except (OSError, ValueError) as error:
        raise CorpusError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise CorpusError(f"{path} has another format than {FORMAT}; prepare the corpus again")
    try:
        splits = from_mapping(_Splits, found.get("splits"))
        manifest = from_mapping(
            Manifest,
            {
                **found,
                "settings": from_mapping(Settings, found.get("settings")),
                "splits": {name: from_mapping(SplitSummary, getattr(splits, name)) for name in SPLITS},
            },
        )
    except InvalidArgument as error:
        raise CorpusError(f"{path} is damaged: {error}") from error
    return manifest


def find_shards(folder: Path) -> dict[Path, Manifest]:
    """Reads the manifests of a corpus by folder: that of the folder itself, or those of all folders in it.

    Raises:
        CorpusError: neither the folder nor all folders in it hold a finished corpus; or a manifest cannot be read.
    """
    if (folder / MANIFEST).exists() or not folder.is_dir():
        return {folder: read_manifest(folder)}
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    if not any((path / MANIFEST).exists() for path in inside):
        return {folder: read_manifest(folder)}
    return {path: read_manifest(path) for path in inside}


def join_manifests(shards: Mapping[Path, Manifest]) -> Manifest:
    """Describes several shards as one corpus; the digest of a split is one of the shards' digests.

    Raises:
        CorpusError: the shards were prepared with different settings.
    """
    (first, manifest), *others = shards.items()
    if not others:
        return manifest
    for folder, other in others:
        if (other.settings, other.separator) != (manifest.settings, manifest.separator):
            raise CorpusError(
                f"{folder} was prepared with other settings than {first}; the shards of a corpus need the same "
                "tokenizer, validation share, field and largest document"
            )
    every = list(shards.values())
    skipped: Counter[str] = sum((Counter(one.skipped) for one in every), Counter())
    return replace(
        manifest,
        splits={split: _join_splits([one.splits[split] for one in every]) for split in SPLITS},
        duplicates=sum(one.duplicates for one in every),
        skipped=dict(skipped),
        sources=[source for one in every for source in one.sources],
    )


def _join_splits(splits: list[SplitSummary]) -> SplitSummary:
    def joined(digests: list[str]) -> str:
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()

    return SplitSummary(
        documents=sum(split.documents for split in splits),
        tokens=sum(split.tokens for split in splits),
        tokens_sha256=joined([split.tokens_sha256 for split in splits]),
        ends_sha256=joined([split.ends_sha256 for split in splits]),
    )
