"""Processes that cost nothing to start: copies of the one that runs the tests."""

import os
import signal
import traceback
import warnings
from collections.abc import Callable

from hsa_compile.autotune.study.trials import this_process


def start(work: Callable[[], object]) -> int:
    """Runs `work` in a copy of this process, which ends with 0, or with 1 and a traceback; returns its number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns where there are threads; work uses none
        pid = os.fork()
    if pid == 0:
        this_process.cache_clear()
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001 (told, and the process ends)
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def wait(pid: int) -> int:
    """Exit code of a copy, or the number of the signal that killed it, negative."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def has_ended(pid: int) -> bool:
    """Whether a copy has ended; `wait` still tells how."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def die() -> None:
    """What a power cut does to this process."""
    os.kill(os.getpid(), signal.SIGKILL)
