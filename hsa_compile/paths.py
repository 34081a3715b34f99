"""The places of files on disk, and the environment variables that change them: no other file reads the environment.

`HSA_COMPILE_CACHE_DIR` replaces the user's cache directory; `HSA_COMPILE_LOG=debug` logs what is done.
"""

import functools
import os
import shlex
import shutil
import tempfile
from pathlib import Path

from hsa_compile.errors import CacheWarning, warn_user

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
    """Returns the root of everything that hsa-compile keeps for this user, as an absolute path.

    It is a temporary directory, and a warning says so, where there is no home, as in a container for a user without
    a name.
    """
    chosen = chosen_cache_dir()
    try:
        directory = Path(chosen or _user_cache_dir()).expanduser()
    except RuntimeError:  # nobody knows where that is
        return _without_home(chosen or "~")
    return directory.absolute()  # a relative name may begin with a hyphen, which a compiler takes for a flag


def _user_cache_dir() -> str:
    import platformdirs

    return platformdirs.user_cache_dir("hsa-compile")


@functools.cache
def _without_home(chosen: str) -> Path:
    directory = temporary_dir()
    warn_user(
        f"there is no home directory for the cache ({chosen}): kernels and schedules are kept in {directory}; "
        "HSA_COMPILE_CACHE_DIR chooses another place",
        CacheWarning,
    )
    return directory


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
    return temporary_dir()


def temporary_dir() -> Path:
    """Returns a private directory of this user's that is lost when the machine starts anew.

    Raises:
        OSError: there is no place for temporary files.
    """
    directory = Path(tempfile.gettempdir()) / f"hsa-compile-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid") and directory.stat().st_uid != os.getuid():
        return _own_temporary_dir()
    return directory


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


def cxx_compiler() -> tuple[str, ...] | None:
    """Returns the command of the C++ compiler that builds CPU kernels, or None: `CXX`, else the first usual name.

    `CXX` may hold arguments, `ccache g++`, which are split as a shell splits them.
    """
    if chosen := os.environ.get("CXX"):
        try:
            program, *arguments = shlex.split(chosen) or [""]
        except ValueError:  # a quotation mark without its other half
            return None
        found = shutil.which(program)
        return (found, *arguments) if found else None
    return next(((found,) for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
