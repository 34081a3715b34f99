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


def kernel_dir() -> Path:
    """Returns the directory of emitted kernels, which are written so that tracebacks and profilers lead to files."""
    return cache_dir() / "kernels"


def lock_dir() -> Path:
    """Returns a directory for the locks of devices: that of kernels, or a temporary one if that cannot be written."""
    directory = kernel_dir()
    try:
        make_cache_dir(directory, mode=0o755)
        if os.access(directory, os.W_OK):
            return directory
    except OSError:
        pass  # `hsa-compile doctor` names the unwritable one
    return temporary_dir()


def make_cache_dir(directory: Path, mode: int = 0o777) -> None:
    """Makes a directory of the cache. The cache's root, if it is made, can be written by this user alone.

    Code is loaded from below that root (`kernel_dir`); what else lies there follows the umask, for a group to share.

    Raises:
        OSError: it cannot be made.
    """
    root = cache_dir()
    if directory.is_relative_to(root):
        root.parent.mkdir(parents=True, exist_ok=True)
        root.mkdir(mode=0o755, exist_ok=True)
    directory.parent.mkdir(parents=True, exist_ok=True)
    directory.mkdir(mode=mode, exist_ok=True)


def why_distrusted(path: Path, root: Path) -> str | None:
    """Says why no code may be loaded from a file or directory: somebody else could have put it there.

    Like ssh with its keys, it wants the file, and each folder from there up to `root`, to belong to this user or to
    root, and not to be writable by others.

    Returns:
        the first reason, or None if there is none.

    Raises:
        OSError: one of them is not there.
    """
    if not hasattr(os, "getuid"):
        return None
    for place in (path, *path.parents):
        status = place.stat()
        if status.st_uid not in (0, os.getuid()):
            return f"{place} belongs to another user, who could put code there"
        if status.st_mode & 0o022:
            return f"others can write to {place} and could put code there, chmod go-w makes it safe"
        if place == root:
            break
    return None


def temporary_dir() -> Path:
    """Returns a private directory of this user's that is lost when the machine starts anew.

    Raises:
        OSError: there is no place for temporary files.
    """
    directory = Path(tempfile.gettempdir()) / f"hsa-compile-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:  # something else has that name
        return _own_temporary_dir()
    return _own_temporary_dir() if why_distrusted(directory, directory) else directory


@functools.cache
def _own_temporary_dir() -> Path:
    """Makes a new directory: whoever made one of a known name could put code there that this process would run."""
    return Path(tempfile.mkdtemp(prefix="hsa-compile-"))


def log_level() -> str | None:
    """Returns the lowest level of messages that the user wants to see (`debug`, `info`, …); None if none was set."""
    return os.environ.get("HSA_COMPILE_LOG")


def restart_count() -> str:
    """Returns how often `torchrun` has started its processes again, of which this is one; 0 without it."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


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
