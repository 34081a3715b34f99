"""How sources become a folder that training reads: tokens and document ends of two splits, and a manifest.

Documents that equal an earlier one byte by byte are left out. A document's hash alone decides its split, so that the
same document is never in both, whatever else is prepared with it. After a kill at any moment, the next call goes on
after the last finished source.
"""

import contextlib
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import filelock

from hsa_compile.errors import CorpusError, InvalidArgument
from hsa_compile.model.data.corpus import TokenCorpus
from hsa_compile.model.data.corpus_writer import FILES, HASHES, JOURNAL, CorpusWriter
from hsa_compile.model.data.documents import MAX_DOCUMENT_BYTES, Source, stdlib_sources
from hsa_compile.model.data.journal import Settings
from hsa_compile.model.data.manifest import MANIFEST, TRAIN, Manifest, read_manifest
from hsa_compile.model.data.tokenizer import load_tokenizer
from hsa_compile.paths import cache_dir

_LOCK = ".lock"
_VALIDATION = 0.05  # enough of a few megabytes for contexts of 64K tokens that do not overlap


def prepare(
    sources: list[Source],
    out: Path,
    *,
    tokenizer: str | Path = "bytes",
    validation: float = 0.01,
    field: str = "text",
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    overwrite: bool = False,
    wait: bool = False,
    on_progress: Callable[[int], None] = lambda count: None,
) -> Manifest:
    """Prepares a corpus, or goes on with one that was interrupted.

    Args:
        sources: what is read, in this order (`find_sources` and `stdlib_sources` list them).
        out: the folder of the corpus; it is made if it is not there.
        tokenizer: `bytes`, or the path of a `tokenizer.json`, which is copied beside the tokens.
        validation: the share of documents that go to the validation split.
        field: the field that holds the text in JSONL, Parquet and data sets.
        max_document_bytes: longer lines are skipped, and longer text files are cut at line ends.
        overwrite: whether to start anew, whatever the folder holds of a corpus.
        wait: whether to wait for a process that prepares in the same folder, instead of raising.
        on_progress: is told how many bytes need not be read any more.

    Returns:
        The manifest; where the folder already holds this very corpus, the one that is there, and no source is read.

    Raises:
        InvalidArgument: the folder holds another corpus, or an unfinished one with other settings.
        CorpusError: nothing could be used, the disk is full, or another process prepares in the same folder.
        MissingDependency: a source or the tokenizer needs a package that is not installed.
    """
    if not sources:
        raise InvalidArgument("no source; allowed are files, folders, hf:NAME and --corpus stdlib")
    chosen = load_tokenizer(tokenizer)
    settings = Settings(
        tokenizer=chosen.name,
        tokenizer_digest=chosen.digest,
        validation=validation,
        field=field,
        max_document_bytes=max_document_bytes,
    )
    with _locked(out, wait):
        if overwrite:
            _remove(out, MANIFEST, JOURNAL, *FILES)  # removed, not cut: a map of the old ones stays readable
        if (out / MANIFEST).exists():
            return _already_there(out, settings, sources)
        with contextlib.closing(CorpusWriter(out, chosen, settings, sources)) as writer:
            for source in sources[: writer.num_finished]:
                on_progress(source.size)
            for source in sources[writer.num_finished :]:
                writer.add(source, on_progress)
            manifest = writer.finish()
        _remove(out, JOURNAL, HASHES)
    return manifest


def _already_there(out: Path, settings: Settings, sources: list[Source]) -> Manifest:
    manifest = read_manifest(out)
    held = [{name: item[name] for name in Source.__slots__} for item in manifest.sources]
    if manifest.settings != settings or held != [asdict(source) for source in sources]:
        raise InvalidArgument(
            f"{out} holds a finished corpus of other sources or settings; allowed are another folder or --overwrite"
        )
    _remove(out, JOURNAL, HASHES)  # a process that died after its last write left them
    return manifest


def _remove(out: Path, *names: str) -> None:
    for name in names:
        (out / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(out: Path, wait: bool) -> Iterator[None]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(out / _LOCK)
        lock.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout as error:
        raise CorpusError(f"another process prepares a corpus in {out}") from error
    except OSError as error:
        raise CorpusError(f"cannot write {out}: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


def stdlib_corpus(split: str = TRAIN) -> TokenCorpus:
    """Opens a split of the standard library's corpus in the user's cache; it is prepared where it is not there.

    Raises:
        CorpusError: the corpus is damaged or cannot be written.
    """
    directory = cache_dir() / "corpora" / f"stdlib-{platform.python_version()}"  # another Python has other sources
    prepare(stdlib_sources(), directory, validation=_VALIDATION, wait=True)
    return TokenCorpus(directory, split=split)
