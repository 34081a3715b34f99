"""The device that candidates run on: the memory that is free, the lock that one process holds, and the clocks.

Memory is checked before tensors are made, since Linux kills a process that asks for too much.
"""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import filelock
import torch

from hsa_compile.errors import InvalidProblem
from hsa_compile.paths import lock_dir
from hsa_compile.problem import Problem

_CGROUP = Path("/sys/fs/cgroup")
_TIMEOUT_S = 10  # how long nvidia-smi may take


def check_memory(problem: Problem, device: torch.device) -> None:
    """Compares what tuning a problem needs with the memory that is free on the device.

    Raises:
        InvalidProblem: the problem does not fit; the message says how much it needs and how much is free.
    """
    needed, free = needed_bytes(problem), free_bytes(device)
    if free is not None and needed > free:
        raise InvalidProblem(
            f"{problem.describe()} needs about {needed / 2**30:.1f} GiB to tune; "
            f"{device} has {free / 2**30:.1f} GiB free"
        )


def needed_bytes(problem: Problem) -> int:
    """Returns the bytes of the inputs, of float32 results, and of the draws that the inputs are made from."""
    tokens, keys = problem.batch * problem.seq_len, problem.batch * problem.kv_len
    rows = tokens * problem.num_heads * (problem.head_dim + problem.value_dim)
    chunks = keys * problem.num_kv_heads * (problem.head_dim + problem.value_dim)
    picks = tokens * problem.num_kv_heads * problem.top_k
    return (rows + chunks) * (2 * problem.itemsize + 4) + picks * 48


def free_bytes(device: torch.device) -> int | None:
    """Returns the bytes that can still be had on a device; None where that cannot be found out."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [value for value in (_of_machine(), _of_control_group()) if value is not None]
    return min(found, default=None)


def _of_machine() -> int | None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _of_control_group() -> int | None:
    limit, used, parts = (_CGROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if not (limit.exists() and used.exists()) or limit.read_text().strip() == "max":
        return None
    # Pages of files that nobody used lately count as used, and are given back before anything is killed.
    found = re.search(r"^inactive_file (\d+)$", parts.read_text() if parts.exists() else "", re.MULTILINE)
    return int(limit.read_text()) - int(used.read_text()) + (int(found[1]) if found else 0)


def device_lock(device: str) -> filelock.BaseFileLock:
    """Returns the lock of a device, named after the hardware rather than after its number in this process.

    The operating system releases the lock when its holder dies. It lies beside the emitted kernels, where a read-only
    home does not matter, and carries the host's name, since hosts may share that directory.
    """
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"{platform.node()} {_hardware(torch.device(device))}")
    return filelock.FileLock(lock_dir() / f"device-{name}.lock")


def _hardware(device: torch.device) -> str:
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return str(getattr(properties, "uuid", f"{properties.name} {device.index}"))


def clocks_mhz(device: str) -> dict[str, int] | None:
    """Returns the present clocks of a GPU's multiprocessors and memory; None on a CPU, or if nvidia-smi tells none."""
    place, tool = torch.device(device), shutil.which("nvidia-smi")
    if place.type != "cuda" or tool is None:
        return None
    uuid = getattr(torch.cuda.get_device_properties(place), "uuid", None)
    command = [tool, "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits"]
    command += [f"--id=GPU-{uuid}"] if uuid is not None else [f"--id={place.index or 0}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return None
    words = done.stdout.split(",")
    if done.returncode or len(words) != 2 or not all(word.strip().isdecimal() for word in words):
        return None
    return {"sm": int(words[0]), "memory": int(words[1])}
