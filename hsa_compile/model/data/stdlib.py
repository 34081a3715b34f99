"""The corpus that every machine has: the Python standard library's own sources, prepared once."""

import platform

from hsa_compile.model.data.corpus import TokenCorpus
from hsa_compile.model.data.manifest import TRAIN
from hsa_compile.model.data.prepare import prepare
from hsa_compile.model.data.sources import stdlib_sources
from hsa_compile.paths import cache_dir

_VALIDATION = 0.05  # of few megabytes: enough for contexts of 64K tokens that do not overlap


def stdlib_corpus(split: str = TRAIN) -> TokenCorpus:
    """A split of it, in the user's cache; it is prepared where it is not there.

    Raises:
        CorpusError: it is damaged or cannot be written.
    """
    directory = cache_dir() / "corpora" / f"stdlib-{platform.python_version()}"  # another Python has other sources
    prepare(stdlib_sources(), directory, validation=_VALIDATION, wait=True)
    return TokenCorpus(directory, split=split)
