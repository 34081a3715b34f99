"""The growing files of a corpus: a source's documents are added whole or not at all, then recorded in the journal."""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from hsa_compile.errors import CorpusError, UnreadableSource
from hsa_compile.files import file_sha256
from hsa_compile.model.data.documents import Skipped, Source, read_documents
from hsa_compile.model.data.journal import AppendFile, Entry, Journal, Settings
from hsa_compile.model.data.manifest import (
    SPLITS,
    TOKENIZER_FILE,
    TRAIN,
    VALIDATION,
    Manifest,
    SplitSummary,
    ends_name,
    tokens_name,
    write_manifest,
)
from hsa_compile.model.data.tokenizer import FileTokenizer, TokenArray, Tokenizer, token_dtype

JOURNAL, HASHES = "journal.jsonl", "hashes"
FILES = (*(name(split) for split in SPLITS for name in (tokens_name, ends_name)), HASHES)
_HASH_BYTES = 16
_BATCH_BYTES = 2 * 2**20
_MAX_EXAMPLES = 20


class CorpusWriter:
    """The open files of one run, and the hashes of all documents so far.

    Args:
        out: an existing folder that nobody else writes in.
        tokenizer: the tokenizer of the corpus.
        settings: the settings that it is prepared with.
        sources: the sources that will be added, in order; those that a former run finished are known (`num_finished`).

    Raises:
        InvalidArgument: the folder holds an unfinished corpus with other settings.
        CorpusError: a file cannot be written; the constructor and every method may raise it.
    """

    def __init__(self, out: Path, tokenizer: Tokenizer, settings: Settings, sources: list[Source]) -> None:
        self._out, self._tokenizer, self._settings = out, tokenizer, settings
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._journal = Journal(out / JOURNAL, settings, sources, FILES)
        last = self._journal.entries[-1].sizes if self._journal.entries else dict.fromkeys(FILES, 0)
        self._files = {name: AppendFile(out / name, last[name]) for name in FILES}
        hashes = (out / HASHES).read_bytes()
        self._seen = {hashes[start : start + _HASH_BYTES] for start in range(0, len(hashes), _HASH_BYTES)}
        self._num_tokens = {split: last[tokens_name(split)] // self._dtype.itemsize for split in SPLITS}

    @property
    def num_finished(self) -> int:
        """How many sources need not be read again."""
        return len(self._journal.entries)

    def add(self, source: Source, on_progress: Callable[[int], None]) -> None:
        """Reads a source to its end and records it; one that breaks off leaves nothing behind but its name."""
        skipped: Counter[str] = Counter()
        examples: list[tuple[str, str]] = []
        fresh: set[bytes] = set()
        duplicates = 0
        before = dict(self._num_tokens)
        told = 0

        def tell(count: int) -> None:
            nonlocal told
            told += count
            on_progress(count)

        try:
            for batch in _batches(self._documents(source, skipped, examples, tell)):
                kept = []
                for document in batch:
                    digest = hashlib.sha256(bytes(document)).digest()[:_HASH_BYTES]
                    if digest in self._seen or digest in fresh:
                        duplicates += 1
                    else:
                        fresh.add(digest)
                        kept.append((digest, document))
                self._write(kept)
        except UnreadableSource as error:
            for file in self._files.values():
                file.rollback()
            self._num_tokens = before
            fresh, duplicates = set(), 0
            skipped, examples = Counter({str(error): 1}), [("", str(error))]
        self._seen |= fresh
        self._record(source, len(fresh), duplicates, skipped, examples)
        on_progress(max(source.size - told, 0))

    def _documents(
        self, source: Source, skipped: Counter[str], examples: list[tuple[str, str]], tell: Callable[[int], None]
    ) -> Iterator[bytes | TokenArray]:
        limit = self._settings.max_document_bytes
        for item in read_documents(source, field=self._settings.field, max_bytes=limit, on_progress=tell):
            if not isinstance(item, bytes | Skipped):
                item = self._own_ids(item)
            if isinstance(item, Skipped):
                skipped[item.reason] += 1
                if len(examples) < _MAX_EXAMPLES:
                    examples.append((item.where, item.reason))
            else:
                yield item

    def _own_ids(self, ids: TokenArray) -> TokenArray | Skipped:
        """Returns ids that were made elsewhere, as this corpus holds them: without the separator behind them."""
        if (most := int(ids.max())) >= self._tokenizer.vocab_size:
            name = self._tokenizer.name
            raise UnreadableSource(f"token {most}; the tokenizer {name} has {self._tokenizer.vocab_size} ids")
        text = ids[:-1] if ids[-1] == self._tokenizer.separator else ids
        if not text.size:
            return Skipped(reason="empty document")
        return text.astype(self._dtype.newbyteorder("<"), copy=False)

    def _write(self, documents: list[tuple[bytes, bytes | TokenArray]]) -> None:
        found = iter(self._tokenizer.encode_batch([text for _, text in documents if isinstance(text, bytes)]))
        for digest, document in documents:
            tokens = next(found) if isinstance(document, bytes) else document
            split = split_of(digest, self._settings.validation)
            file = self._files[tokens_name(split)]
            file.append(tokens.astype(self._dtype.newbyteorder("<"), copy=False).tobytes())
            self._num_tokens[split] += len(tokens)
            if self._tokenizer.separator is not None:
                file.append(self._tokenizer.separator.to_bytes(self._dtype.itemsize, "little"))
                self._num_tokens[split] += 1
            self._files[ends_name(split)].append(self._num_tokens[split].to_bytes(8, "little"))
            self._files[HASHES].append(digest)

    def _record(
        self, source: Source, documents: int, duplicates: int, skipped: Counter[str], examples: list[tuple[str, str]]
    ) -> None:
        crcs = {name: file.crc for name, file in self._files.items()}
        for file in self._files.values():
            file.mark()
        entry = Entry(
            source=source,
            documents=documents,
            duplicates=duplicates,
            skipped=dict(skipped),
            examples=tuple(examples),
            sizes={name: file.size for name, file in self._files.items()},
            crcs=crcs,
        )
        self._journal.add(entry)

    def finish(self) -> Manifest:
        """Waits until the disk has all files, then writes the manifest."""
        entries = self._journal.entries
        skipped = sum((Counter(entry.skipped) for entry in entries), Counter[str]())
        if not self._seen:
            raise CorpusError(f"no document in {len(entries)} sources: {_first_reasons(entries)}")
        for file in self._files.values():
            file.sync()
        if isinstance(self._tokenizer, FileTokenizer):
            _write_whole(self._out / TOKENIZER_FILE, self._tokenizer.content)
        manifest = Manifest(
            settings=self._settings,
            vocab_size=self._tokenizer.vocab_size,
            separator=self._tokenizer.separator,
            dtype=self._dtype.name,
            splits={split: self._summary(split) for split in SPLITS},
            duplicates=sum(entry.duplicates for entry in entries),
            skipped=dict(skipped),
            sources=[_of_source(entry) for entry in entries],
        )
        write_manifest(self._out, manifest)
        return manifest

    def _summary(self, split: str) -> SplitSummary:
        return SplitSummary(
            documents=self._files[ends_name(split)].size // 8,
            tokens=self._num_tokens[split],
            tokens_sha256=file_sha256(self._out / tokens_name(split)),
            ends_sha256=file_sha256(self._out / ends_name(split)),
        )

    def close(self) -> None:
        """Closes all files; the journal knows what is finished."""
        for file in self._files.values():
            file.close()
        self._journal.close()


def split_of(digest: bytes, validation: float) -> str:
    """Returns the split of a document, which the first eight bytes of its SHA-256 decide."""
    return VALIDATION if int.from_bytes(digest[:8], "big") < validation * 2**64 else TRAIN


def _batches(documents: Iterator[bytes | TokenArray]) -> Iterator[list[bytes | TokenArray]]:
    """Yields documents in groups that a tokenizer can work on with all cores."""
    batch: list[bytes | TokenArray] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _of_source(entry: Entry) -> dict[str, object]:
    counts = {name: getattr(entry, name) for name in ("documents", "duplicates", "skipped", "examples")}
    return {**asdict(entry.source), **counts}


def _first_reasons(entries: list[Entry]) -> str:
    named = [f"{entry.source.path}: {reason}" for entry in entries for reason in entry.skipped]
    return "; ".join(named[:3]) + ("; …" if len(named) > 3 else "")


def _write_whole(path: Path, content: bytes) -> None:
    file = AppendFile(path)
    with contextlib.closing(file):
        file.append(content)
        file.sync()
