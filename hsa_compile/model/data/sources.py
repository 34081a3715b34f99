"""Which files a corpus is made of: what a person named, with folders opened, in an order that never changes."""

import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hsa_compile.errors import InvalidArgument

TEXT, JSONL, PARQUET, HUB = "text", "jsonl", "parquet", "hub"
KINDS = (TEXT, JSONL, PARQUET, HUB)
HUB_PREFIX = "hf:"
COMPRESSIONS = (".gz", ".zst")
_NO_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A file of documents, as it was when it was listed; two are equal if nothing was written in between.

    Attributes:
        path: the absolute path; for kind `hub` the name of a data set, with `@split` where one was named.
        kind: `text`, one document a file; `jsonl`, one a line; `parquet`, one a row; `hub`, one a row.
        size: how many bytes it has on disk, 0 for `hub`.
        modified_ns: when it was last changed, 0 for `hub`.
    """

    path: str
    kind: str
    size: int = 0
    modified_ns: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidArgument(f"kind of source {self.kind!r}; allowed are {', '.join(KINDS)}")


def find_sources(named: Sequence[str | Path], *, without: Path | None = None) -> list[Source]:
    """Lists all files to read, each once; a folder stands for every file in it but hidden ones, sorted by path.

    Args:
        named: files, folders, and data sets as `hf:NAME` or `hf:NAME@SPLIT`.
        without: a folder to leave out, which is that of the corpus itself where it lies among its sources.

    Raises:
        InvalidArgument: a name leads to nothing, or to what is neither a file nor a folder.
    """
    found: dict[str, Source] = {}
    for name in named:
        if str(name).startswith(HUB_PREFIX):
            data_set = str(name).removeprefix(HUB_PREFIX)
            found.setdefault(str(name), Source(path=data_set, kind=HUB))
            continue
        path = Path(name).expanduser()
        if not (path.is_file() or path.is_dir()):
            what = "is neither a file nor a folder" if path.exists() else "does not exist"
            raise InvalidArgument(f"source {name} {what}; allowed are files, folders and hf:NAME")
        root = path.resolve()
        left_out = without.resolve() if without else None
        _add(found, _files_under(root, left_out) if root.is_dir() else [root])
    return list(found.values())


def stdlib_sources() -> list[Source]:
    """Lists the Python standard library's own sources, without its tests, which many distributions leave out."""
    root = Path(sysconfig.get_paths()["stdlib"]).resolve()
    files = (path for path in _files_under(root, None) if path.suffix == ".py")
    found: dict[str, Source] = {}
    _add(found, (path for path in files if not _NO_LIBRARY & set(path.relative_to(root).parts)))
    return list(found.values())


def kind_of(path: Path) -> str:
    """Says how a file is read, by its name without `.gz` or `.zst`; what is not known is text."""
    stem = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    return {".jsonl": JSONL, ".ndjson": JSONL, ".parquet": PARQUET}.get(stem.suffix, TEXT)


def _files_under(root: Path, left_out: Path | None) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and here / name != left_out)
        if here != left_out:
            yield from (here / name for name in sorted(files) if not name.startswith("."))


def _add(found: dict[str, Source], paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            status = path.stat()
        except OSError:
            status = None  # a dangling link, or vanished just now: listed, and named as skipped when it is read
        if status is None or path.is_file():  # pipes and devices in a folder are no documents
            size, modified = (status.st_size, status.st_mtime_ns) if status else (0, 0)
            found.setdefault(str(path), Source(path=str(path), kind=kind_of(path), size=size, modified_ns=modified))
