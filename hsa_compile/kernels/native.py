"""Builds emitted C++ into shared libraries, once for each machine, and converts arguments to what they take."""

import ctypes
import hashlib
import subprocess
import tempfile
from pathlib import Path

from torch import Tensor

from hsa_compile.errors import CompileError
from hsa_compile.files import read_regular, write_whole
from hsa_compile.paths import cxx_compiler, why_distrusted

# Each vector extension has flags of its own, rather than -march=native: what is built depends on nothing that the
# source does not name, so machines can share a cache directory.
_VECTOR_FLAGS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    "avx2": ("-mavx2", "-mfma"),
}
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=fast", "-fno-math-errno")
_BUILD_TIMEOUT_S = 300


def build_library(source: Path, arch: str) -> Path:
    """Builds the shared library of an emitted C++ file unless it is there as a whole, and returns its path.

    Raises:
        CompileError: there is no compiler, or it refuses the file.
        OSError: the library cannot be written.
    """
    library, checksum = source.with_suffix(".so"), source.with_suffix(".so.sha256")
    if not _is_whole(library, checksum):
        _build(source, library, arch)
        write_whole(checksum, _digest(library))
    return library


def _is_whole(library: Path, checksum: Path) -> bool:
    """Returns whether a library is there that nobody else can have written, and no part of it is missing."""
    try:
        return why_distrusted(library, library) is None and read_regular(checksum) == _digest(library)
    except OSError:
        return False


def _build(source: Path, library: Path, arch: str) -> None:
    compiler = cxx_compiler()
    if compiler is None:
        raise CompileError("no C++ compiler is found (CXX, c++, g++ or clang++)")
    name = " ".join(compiler)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=f".{library.stem}.") as directory:
        built = Path(directory) / library.name
        command = [*compiler, *_FLAGS, *_VECTOR_FLAGS.get(arch, ()), str(source), "-o", str(built)]
        try:
            # The build has a session of its own: Ctrl-C ends a search after it, and must not look like its failure.
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=False, start_new_session=True
            )
        except subprocess.TimeoutExpired as error:
            raise CompileError(f"{name} took more than {_BUILD_TIMEOUT_S} s for {source}") from error
        except OSError as error:
            raise CompileError(f"the C++ compiler {name} cannot be run: {error.strerror}") from error
        if done.returncode:
            raise CompileError(f"{name} refuses {source}: {done.stderr.strip()[-2000:]}")
        if not (built.is_file() and built.stat().st_size):
            raise CompileError(f"the C++ compiler {name} says that all is well, but wrote no library")
        built.chmod(0o755)  # whatever the umask is: it is loaded only if nobody else can write it
        built.replace(library)


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
