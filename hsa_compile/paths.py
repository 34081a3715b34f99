"""Where things lie on disk, and the only place that reads the environment.

`HSA_COMPILE_CACHE_DIR` beats the user's cache directory.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

PACKAGE_DIR = Path(__file__).parent
TEMPLATE_DIR = PACKAGE_DIR / "kernels" / "templates"
PRETUNED_DIR = PACKAGE_DIR / "schedules" / "pretuned"


def cache_dir() -> Path:
    """The root of everything that hsa-compile keeps for this user."""
    if chosen := os.environ.get("HSA_COMPILE_CACHE_DIR"):
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
    return fallback


def cxx_compiler() -> str | None:
    """The C++ compiler that builds CPU kernels: `CXX`, else the first of the usual names; None if there is none."""
    if chosen := os.environ.get("CXX"):
        return shutil.which(chosen)
    return next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


def triton_interprets() -> bool:
    """Whether Triton kernels of this process run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "on", "yes"}


def stdout_is_a_terminal() -> bool:
    """Whether a person watches (progress bars go to stderr)."""
    return sys.stderr.isatty()
