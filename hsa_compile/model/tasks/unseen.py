"""Real text that a model was not trained on: sources and documentation of installed packages, less all that it knows.

A file is left out if it equals a document of the training text or an earlier file, or if more than a tenth of its long
lines stand in the training text, as in a copy that somebody changed a little.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.data.corpus import TokenCorpus
from hsa_compile.model.data.documents import Source, stdlib_sources
from hsa_compile.model.tasks.haystack import MAX_TEXT_BYTES, SEPARATOR, STDLIB, TextHaystack, documents_of

PACKAGES = "packages"
# PyTorch, numpy and what PyTorch itself needs are on every machine that runs a model.
NAMES = ("numpy", "sympy", "networkx", "mpmath", "torch")
_SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt"}
_LONG_LINE = 32
_KNOWN_LINES = 0.1  # the largest share of long lines that a file may have in common with the training text


def packages_haystack(corpus: str = STDLIB) -> TextHaystack:
    """Makes a haystack of installed packages, of which a model that was trained on a corpus has seen nothing.

    Args:
        corpus: the corpus that the model was trained on, as a run's `data.corpus` names it: `stdlib`, a folder, or
            nothing. The standard library's sources are left out in any case.

    Raises:
        InvalidArgument: none of the packages is installed.
        CorpusError: the corpus is not there any more, or damaged.
    """
    return _packages(corpus)


@functools.cache
def _packages(corpus: str) -> TextHaystack:
    training = _texts(stdlib_sources())
    if corpus not in ("", STDLIB):
        training = itertools.chain(training, _corpus_texts(TokenCorpus(Path(corpus).expanduser())))
    return unseen_text({name: root for name in NAMES if (root := _root(name)) is not None}, training)


def unseen_text(
    roots: Mapping[str, Path], training: Iterable[bytes], *, max_bytes: int = MAX_TEXT_BYTES
) -> TextHaystack:
    """Joins the sources and documentation in folders, less what stands in the training text.

    Args:
        roots: the folder of each package.
        training: the documents that a model was trained on.
        max_bytes: how much text is enough.

    Returns:
        the haystack; its `origin` has the packages with their versions, how many files were left out, what share of
        long lines is known all the same, and the SHA-256 of the text.

    Raises:
        InvalidArgument: there is no such text.
    """
    seen: set[bytes] = set()
    known: set[int] = set()
    for document in training:
        seen.add(hashlib.sha256(document).digest())
        known.update(map(hash, _long_lines(document)))
    parts: list[bytes] = []
    size = num_files = num_left_out = num_lines = num_known = 0
    for document in _texts(_sources(roots)):
        if size >= max_bytes:
            break
        lines = list(_long_lines(document))
        familiar = sum(hash(line) in known for line in lines)
        digest = hashlib.sha256(document).digest()
        if digest in seen or familiar > _KNOWN_LINES * len(lines):
            num_left_out += 1
            continue
        seen.add(digest)
        num_files, num_lines, num_known = num_files + 1, num_lines + len(lines), num_known + familiar
        parts += (document, SEPARATOR)
        size += len(document) + 1
    if not parts:
        raise InvalidArgument(f"no text of {', '.join(roots) or ', '.join(NAMES)} is here that was not trained on")
    text = b"".join(parts)[:max_bytes]
    origin = {
        "packages": {name: _version(name) for name in roots},
        "files": num_files,
        "files_left_out": num_left_out,
        "known_lines": num_known / max(num_lines, 1),
        "bytes": len(text),
        "sha256": hashlib.sha256(text).hexdigest(),
    }
    return TextHaystack(PACKAGES, text, origin)


def _long_lines(document: bytes) -> Iterator[bytes]:
    return (line for line in map(bytes.strip, document.splitlines()) if len(line) >= _LONG_LINE)


def _root(name: str) -> Path | None:
    found = importlib.util.find_spec(name)
    locations = found.submodule_search_locations if found is not None else None
    return Path(locations[0]).resolve() if locations else None


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _sources(roots: Mapping[str, Path]) -> list[Source]:
    return [
        Source(path=str(path), kind="text")
        for root in roots.values()
        for path in sorted(root.rglob("*"))
        if path.suffix in _SUFFIXES and path.is_file()
    ]


def _texts(sources: Iterable[Source]) -> Iterator[bytes]:
    for source in sources:
        yield from documents_of(source)


def _corpus_texts(corpus: TokenCorpus) -> Iterator[bytes]:
    tokenizer = corpus.tokenizer()
    return (tokenizer.decode(document).encode() for document in corpus.documents)
