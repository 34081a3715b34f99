"""Turns an emitted kernel into one that can be called: Python runs, C++ is built, each beside a file to read."""

import ctypes
import errno
import functools
import importlib.util
import linecache
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch.autograd import profiler

from hsa_compile.errors import CacheError, CacheWarning, CompileError, MissingDependency, warn_user
from hsa_compile.files import read_regular, write_whole
from hsa_compile.kernels.emit import KernelSource
from hsa_compile.kernels.hsa_attention.native import attention_entry
from hsa_compile.kernels.hsa_decode.native import decode_entry
from hsa_compile.kernels.launch import quicken
from hsa_compile.kernels.native import CxxRunner, build_library
from hsa_compile.kernels.select_chunks.native import select_entry
from hsa_compile.paths import cache_dir, kernel_dir, make_cache_dir, temporary_dir, why_distrusted
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Schedule

# Op → the function that makes a callable on tensors of what its built library holds.
NATIVE_ENTRIES: dict[str, Callable[[ctypes.CDLL, Problem, Schedule], Callable[..., Any]]] = {
    "hsa_forward": attention_entry,
    "hsa_backward": attention_entry,
    "select_chunks": select_entry,
    "select_chunks_backward": select_entry,
    "hsa_decode": decode_entry,
}

R = TypeVar("R")

_modules: dict[str, Any] = {}  # fingerprint → imported module; of C++, the source's path and the loaded library
_unusable: set[Path] = set()  # directories that a warning was given about


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel that can be called.

    Attributes:
        source: the emitted source that it was made from.
        path: the file that holds the source.
        entry: the function to call with tensors.
        module: the imported module or loaded library, for inspection.
    """

    source: KernelSource
    path: Path
    entry: Callable[..., Any]
    module: Any

    def run(self, *tensors: Any, **options: Any) -> Any:
        """Calls `entry`; a trace shows the call under its problem and schedule, also by NVTX (`emit_nvtx`)."""
        if not profiler._is_profiler_enabled:  # the name of a range takes as long as a small kernel
            return self.entry(*tensors, **options)
        with profiler.record_function(f"{self.source.problem.describe()} | {self.source.schedule}"):
            return self.entry(*tensors, **options)


def compile_kernel(source: KernelSource) -> Kernel:
    """Writes the source to its file and imports it; C++ is built first, once for each machine.

    A Triton module compiles its kernels when they are first launched (a device of the target's kind must be
    there); `ahead_of_time.compile_launches` compiles them for a device that is not.

    Raises:
        MissingDependency: the target needs Triton and it is not installed.
        CompileError: the module cannot be imported, or the C++ compiler refuses it.
        CompileTimedOut: the C++ compiler takes minutes.
        CacheError: C++ can be built in no directory.
    """
    if source.backend == "cpp":
        return _compile_native(source)
    module = _modules.get(source.fingerprint)
    if module is None:
        if source.backend == "triton" and importlib.util.find_spec("triton") is None:
            raise MissingDependency(f"target {source.target.arch} needs Triton: pip install 'triton>=3.6'")
        module = _import(source, _written(source))
        if source.backend == "triton":
            quicken(module)
        _modules[source.fingerprint] = module
    return Kernel(source=source, path=Path(module.__file__), entry=getattr(module, source.entry), module=module)


def build_native(source: KernelSource, runner: CxxRunner | None = None) -> Path:
    """Builds emitted C++ without loading it into this process; returns the library's file.

    Args:
        source: the emitted source.
        runner: what runs the compiler, as in `build_library`.

    Raises:
        CompileError, CompileTimedOut, CacheError: as in `compile_kernel`.
    """
    return _in_some_directory(functools.partial(_build, source, runner=runner))


def _compile_native(source: KernelSource) -> Kernel:
    loaded = _modules.get(source.fingerprint)
    if loaded is None:
        loaded = _modules[source.fingerprint] = _in_some_directory(functools.partial(_load, source))
    path, library = loaded
    # An op that is not in the table has no C++.
    entry = NATIVE_ENTRIES[source.problem.op](library, source.problem, source.schedule)
    return Kernel(source=source, path=path, entry=entry, module=library)


def _in_some_directory(use: Callable[[Path], R]) -> R:
    """Does something in the directory of kernels; if that cannot be, in a temporary one, and one warning says why.

    The directory may be full, read-only, open to others, or on a file system from which no library can be loaded.

    Raises:
        CacheError: it can be done in neither.
    """
    directory = kernel_dir()
    try:
        make_cache_dir(directory, mode=0o755)
        return use(directory)
    except OSError as error:
        failed = error
    try:
        spare = temporary_dir()
        result = use(spare)
    except OSError as error:
        raise CacheError(
            f"no kernel can be kept in {directory} ({failed.strerror or failed}), nor in a temporary directory: "
            f"{error.strerror or error}"
        ) from failed
    if directory not in _unusable:
        _unusable.add(directory)
        warn_user(
            f"a kernel cannot be kept in {directory} ({failed.strerror or failed}); {spare} serves instead",
            CacheWarning,
        )
    return result


def _load(source: KernelSource, directory: Path) -> tuple[Path, ctypes.CDLL]:
    library = ctypes.CDLL(str(_build(source, directory)))
    return _path(source, directory), library


def _build(source: KernelSource, directory: Path, runner: CxxRunner | None = None) -> Path:
    root = cache_dir() if directory == kernel_dir() else directory
    if reason := why_distrusted(directory, root):
        raise PermissionError(errno.EPERM, reason)
    return build_library(_write(source, directory), source.target.arch, runner)


def _write(source: KernelSource, directory: Path) -> Path:
    """Writes the text to its file as a whole or not at all; a damaged file of that name is replaced."""
    path, text = _path(source, directory), source.text.encode()
    try:
        is_there = read_regular(path, len(text)) == text
    except OSError:
        is_there = False
    if not is_there:
        write_whole(path, text)
    return path


def _path(source: KernelSource, directory: Path) -> Path:
    suffix = "cpp" if source.backend == "cpp" else "py"
    return directory / f"{source.entry}_{source.schedule.dataflow}_{source.fingerprint}.{suffix}"


def _written(source: KernelSource) -> Path:
    """Writes a Python module's file and returns its path; where it cannot be written, the path that it would have."""
    try:
        return _in_some_directory(functools.partial(_write, source))
    except CacheError as error:
        directory = kernel_dir()
        if directory not in _unusable:
            _unusable.add(directory)
            warn_user(f"{error}; kernels run from memory", CacheWarning)
        return _path(source, directory)


def _import(source: KernelSource, path: Path) -> Any:
    """Runs the emitted text as a module. The file is for people: what others may have written to it never runs."""
    name, text = f"hsa_compile_emitted_{path.stem}", source.text
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # Triton and pickle look modules up by name
    # Triton asks for the source of a kernel, tracebacks for its lines: None for a date keeps this text, not the file's.
    linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
    try:
        exec(compile(text, str(path), "exec"), module.__dict__)
    except (SyntaxError, ImportError, AttributeError) as error:
        del sys.modules[name]
        raise CompileError(f"the emitted module {path} cannot be imported: {error}") from error
    return module
