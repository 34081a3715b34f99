"""Builds emitted C++ into shared libraries, once for each machine, and converts arguments to what they take."""

import contextlib
import ctypes
import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from hsa_compile.errors import CompileError, CompilerCrashed, CompileTimedOut, compile_error
from hsa_compile.files import read_regular, write_whole
from hsa_compile.paths import cxx_compiler, why_distrusted

# Each vector extension has flags of its own, rather than -march=native: what is built depends on nothing that the
# source does not name, so machines can share a cache directory.
_VECTOR_FLAGS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    "avx2": ("-mavx2", "-mfma"),
}
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=fast", "-fno-math-errno")
_BUILD_ENDING = ".build"  # what the names of folders end in, in which libraries are built
_STALE_S = 86_400.0  # a folder of that age is what a killed process left


class CxxRunner:
    """Runs C++ compilers, each in a session of its own, so that Ctrl-C does not look like a failure of theirs.

    Args:
        timeout_s: how long one may take before it is killed with all that it started.
    """

    def __init__(self, timeout_s: float = 300.0) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._closed = False
        self._running: set[subprocess.Popen[str]] = set()

    def run(self, command: Sequence[str]) -> tuple[int, str]:
        """Runs a compiler; returns its exit code and what it says.

        Raises:
            CompileTimedOut: it took too long.
            CompilerCrashed: it was killed, or the runner is closed.
            OSError: it cannot be started.
        """
        with self._lock:
            if self._closed:
                raise CompilerCrashed("the search has ended")
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
                start_new_session=True,
            )  # fmt: skip
            self._running.add(process)
        with process:
            try:
                _, said = process.communicate(timeout=self._timeout_s)
            except subprocess.TimeoutExpired as error:
                raise CompileTimedOut(f"{command[0]} was killed after {self._timeout_s:.0f} s") from error
            finally:
                self._running.discard(process)
                _kill(process)
        if process.returncode < 0:
            raise CompilerCrashed(f"{command[0]} died of {signal.Signals(-process.returncode).name}")
        return process.returncode, said

    def close(self) -> None:
        """Kills what is running, and lets nothing more run; it may be called from another thread."""
        with self._lock:
            self._closed = True
            for process in tuple(self._running):
                _kill(process)


def _kill(process: "subprocess.Popen[str]") -> None:
    """Kills a process that has not ended, with all that it started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def build_library(source: Path, arch: str, runner: CxxRunner | None = None) -> Path:
    """Builds the shared library of an emitted C++ file unless it is there as a whole, and returns its path.

    Args:
        source: the file.
        arch: the vector extension that it is built for.
        runner: what runs the compiler; one with a limit of five minutes if None.

    Raises:
        CompileError: there is no compiler, it refuses the file, or it cannot do its work (`CompilerCrashed`).
        CompileTimedOut: it took too long.
        OSError: the library cannot be written.
    """
    library, checksum = source.with_suffix(".so"), source.with_suffix(".so.sha256")
    if not _is_whole(library, checksum):
        _build(source, library, arch, runner or CxxRunner())
        write_whole(checksum, _digest(library))
    return library


def _is_whole(library: Path, checksum: Path) -> bool:
    """Returns whether a library is there that nobody else can have written, and no part of it is missing."""
    try:
        return why_distrusted(library, library) is None and read_regular(checksum) == _digest(library)
    except OSError:
        return False


def _build(source: Path, library: Path, arch: str, runner: CxxRunner) -> None:
    compiler = cxx_compiler()
    if compiler is None:
        raise CompileError("no C++ compiler is found (CXX, c++, g++ or clang++)")
    name = " ".join(compiler)
    _remove_stale(library.parent)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=f".{library.stem}.", suffix=_BUILD_ENDING) as directory:
        built = Path(directory) / library.name
        command = [*compiler, *_FLAGS, *_VECTOR_FLAGS.get(arch, ()), str(source), "-o", str(built)]
        try:
            code, said = runner.run(command)
        except OSError as error:
            raise compile_error(f"the C++ compiler {name} cannot be run: {error.strerror}") from error
        if code:
            raise compile_error(f"{name} fails with {source}: {said.strip()[-2000:]}")
        if not (built.is_file() and built.stat().st_size):
            raise CompileError(f"the C++ compiler {name} says that all is well, but wrote no library")
        built.chmod(0o755)  # whatever the umask is: it is loaded only if nobody else can write it
        built.replace(library)


def _remove_stale(directory: Path) -> None:
    """Removes the folders in which processes built that were killed."""
    for folder in directory.glob(f".*{_BUILD_ENDING}"):
        with contextlib.suppress(OSError):  # another process removes it at the same time
            if time.time() - folder.stat().st_mtime > _STALE_S:
                shutil.rmtree(folder)


def _digest(path: Path) -> bytes:
    return hashlib.sha256(read_regular(path)).hexdigest().encode()


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    """Returns a pointer to a tensor's elements, which live as long as the pointer; null for None."""
    address = ctypes.c_void_p(None if x is None else x.data_ptr())
    address.tensor = x  # type: ignore[attr-defined]  # native code may be at work when the caller's frame has ended
    return address


def sizes(*values: int) -> list[ctypes.c_int64]:
    """Returns integers as the emitted functions take them."""
    return [ctypes.c_int64(value) for value in values]
