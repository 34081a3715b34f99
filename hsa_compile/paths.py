"""Where things lie on disk, and the only place that reads the environment.

`HSA_COMPILE_CACHE_DIR` beats the user's cache directory; `HSA_COMPILE_LOG=debug` says what is done.
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
    """What the user set, as it stands."""
    return os.environ.get("HSA_COMPILE_CACHE_DIR")


def cache_dir() -> Path:
    """The root of everything that hsa-compile keeps for this user."""
    if chosen := chosen_cache_dir():
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("hsa-compile"))


def schedule_dir() -> Path:
    """One JSON file of tuned schedules a device."""
    return cache_dir() / "schedules"


def source_dir() -> Path:
    """Where emitted kernels are written, so that tracebacks and profilers lead to real files.

    Falls back to a private temporary directory where the cache cannot be written: a read-only home must
    not stop a kernel from running.
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
    """A new directory: whoever made the usual one could put code there that this process would run."""
    return Path(tempfile.mkdtemp(prefix="hsa-compile-"))


def log_level() -> str | None:
    """How much the user wants to be told: `debug`, `info`, `warning`, …; None if nothing was said."""
    return os.environ.get("HSA_COMPILE_LOG")


def quiet_profiler() -> None:
    """Keeps PyTorch's profiler from writing two lines to standard error each time it runs.

    They have a level above that of errors. A level that the user set stays.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def cxx_compiler() -> str | None:
    """The C++ compiler that builds CPU kernels: `CXX`, else the first of the usual names; None if there is none."""
    if chosen := os.environ.get("CXX"):
        return shutil.which(chosen)
    return next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
