"""Who works on a trial: a process of a host, told apart from a later one with the same number."""

import functools
import os
import platform
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

_ABANDONED_AFTER = timedelta(hours=1)  # a trial of another host, whose processes cannot be seen from here


@functools.cache
def this_process() -> dict[str, Any]:
    """Host, process and its start, as a trial carries them."""
    return {"host": platform.node(), "pid": os.getpid(), "started": _started(os.getpid())}


def is_gone(owner: Mapping[str, Any], since: datetime | None) -> bool:
    """Whether nobody works on a trial any more.

    Args:
        owner: what `this_process` gave where the trial began; empty if it was given back.
        since: when the trial began.
    """
    if not owner:
        return True
    if owner["host"] != platform.node():
        return since is not None and datetime.now() - since > _ABANDONED_AFTER
    return _started(owner["pid"]) != owner["started"]


def _started(pid: int) -> str:
    """When a process began, in ticks since the machine did; empty if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "" if Path("/proc").exists() or not _exists(pid) else "exists"
    return "" if fields[0] in "ZX" else fields[19]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
