"""The places of files on disk, and the environment variables that change them: no other file reads the environment.

`HSA_COMPILE_CACHE_DIR` replaces the user's cache directory; `HSA_COMPILE_LOG=debug` logs what is done.
"""

import functools
import os
import shutil
import tempfile
from pathlib import Path

PACKAGE_DIR = Path(__file__).parent
TEMPLATE_DIR = PACKAGE_DIR / "kernels" / "templates"
PRETUNED_DIR = PACKAGE_DIR / "schedules" / "pretuned"
REGRET_FILE = PACKAGE_DIR / "schedules" / "regret.json"
RECIPE_DIR = PACKAGE_DIR / "model" / "recipes"
CHECKPOINT_DIR = PACKAGE_DIR / "model" / "checkpoints"


def chosen_cache_dir() -> str | None:
    """Returns the cache directory that the user set, letter by letter, or None."""
    return os.environ.get("HSA_COMPILE_CACHE_DIR")


def cache_dir() -> Path:
    """Returns the root of everything that hsa-compile keeps for this user."""
    if chosen := chosen_cache_dir():
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("hsa-compile"))


def schedule_dir() -> Path:
    """Returns the directory of tuned schedules, which holds one JSON file for each device."""
    return cache_dir() / "schedules"


def source_dir() -> Path:
    """Returns the directory that emitted kernels are written to, so that tracebacks and profilers lead to real files.

    It is a private temporary directory where the cache cannot be written: a read-only home must not stop a kernel
    from running.
    """
    directory = cache_dir() / "kernels"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK):
            return directory
    except OSError:
        pass  # the temporary directory below serves; `hsa-compile doctor` names the unwritable one
    fallback = Path(tempfile.gettempdir()) / f"hsa-compile-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    fallback.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid") and fallback.stat().st_uid != os.getuid():
        return _own_temporary_dir()
    return fallback


@functools.cache
def _own_temporary_dir() -> Path:
    """Makes a new directory: whoever made one of a known name could put code there that this process would run."""
    return Path(tempfile.mkdtemp(prefix="hsa-compile-"))


def log_level() -> str | None:
    """Returns the lowest level of messages that the user wants to see (`debug`, `info`, …); None if none was set."""
    return os.environ.get("HSA_COMPILE_LOG")


def quiet_profiler() -> None:
    """Keeps PyTorch's profiler from writing two lines to standard error each time it runs.

    Those lines have a level above that of errors. If the user set a level for them, it stays.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def cxx_compiler() -> str | None:
    """Returns the C++ compiler that builds CPU kernels: `CXX`, else the first of the usual names, or None."""
    if chosen := os.environ.get("CXX"):
        return shutil.which(chosen)
    return next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
