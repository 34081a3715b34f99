"""The worker process of an isolated bench: it opens one bench and answers calls until the connection closes."""

import ctypes
import importlib
import resource
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hsa_compile.errors import HSACompileError

_PR_SET_PDEATHSIG = 1
_NO_MEMORY = "can't allocate memory"  # PyTorch's message where a CPU's memory runs out, which has no error type


def serve(handle: int) -> None:
    """Answers `(verb, arguments)` on a connection with `("done", value)` or `("raised", name, message)`.

    An error that has no name in this project ends the process with its traceback on standard error: the caller reads
    it there, and starts another process.
    """
    connection = Connection(handle)
    _die_with_parent()
    factory, arguments, memory_bytes = connection.recv()
    open_bench = by_name(factory)
    if memory_bytes is not None:
        _limit_memory(memory_bytes)
    bench = open_bench(*arguments)
    connection.send(("done", None))
    while True:
        try:
            verb, arguments = connection.recv()
        except EOFError:
            return
        connection.send(_answer(bench, verb, arguments))


def by_name(name: str) -> Any:
    """Imports and returns what `module:attribute` names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _answer(bench: Any, verb: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    try:
        return "done", getattr(bench, verb)(*arguments)
    except HSACompileError as error:
        return "raised", type(error).__name__, str(error)
    except OSError as error:  # a full disk, a file that cannot be opened: no fault of the candidate
        return "raised", "CandidateCrashed", f"{type(error).__name__}: {error}"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and _NO_MEMORY not in str(error):
            raise
        return "raised", "OutOfMemory", f"not enough memory: {error}"


def _limit_memory(more_bytes: int) -> None:
    """Limits the memory of this process to so many bytes more than it has mapped by now."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + more_bytes, mapped + more_bytes))


def _die_with_parent() -> None:
    """Asks Linux to kill this process with its parent, since it would else hold the device while its candidate runs.

    Linux does so when the thread ends that started this process, so it is one that lives as long as the parent.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
