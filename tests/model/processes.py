"""Commands in processes of their own, as a person or `torchrun` starts them, and functions in a group of processes."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Only against a test that hangs for ever: no test depends on how quick a machine is.
TIME_LIMIT = 3600


def start(out: Path, *arguments: str, num_processes: int = 1, restarts: int = 0) -> "subprocess.Popen[str]":
    """`hsa-compile train`, begun as by `launch`."""
    return launch("train", "--out", str(out), *arguments, num_processes=num_processes, restarts=restarts)


def launch(*arguments: str, num_processes: int = 1, restarts: int = 0) -> "subprocess.Popen[str]":
    """`hsa-compile` on one thread a process, with the cache of the test."""
    command = [sys.executable, "-W", "ignore"]
    if num_processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(num_processes)]
        command += ["--master-port", str(_free_port()), "--max-restarts", str(restarts)]
    return subprocess.Popen(
        [*command, "-m", "hsa_compile", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]", code: int = 0) -> str:
    """Waits; returns standard output."""
    try:
        out, err = process.communicate(timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes, too
        out, err = process.communicate()
        raise AssertionError(f"still running after {TIME_LIMIT} s: {out} {err}") from None
    assert process.returncode == code, err
    return out


def in_group(task: Callable[..., None], size: int, directory: Path, *arguments: Any) -> None:
    """Calls a function in each of some processes that form a group; an error in one of them is raised here."""
    torch.multiprocessing.spawn(_join_and_call, (str(directory / "rendezvous"), size, task, arguments), nprocs=size)


def _join_and_call(
    rank: int, rendezvous: str, size: int, task: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    task(*arguments)
    torch.distributed.destroy_process_group()


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    """Until something came about in a process that still runs."""
    deadline = time.monotonic() + TIME_LIMIT
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def losses(directory: Path) -> dict[int, float]:
    """By step."""
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    found = {record["step"]: record["loss"] for record in records if "loss" in record}
    assert len(found) == sum("loss" in record for record in records)  # no step twice
    return found


def rank_pid(torchrun: "subprocess.Popen[str]", rank: int) -> int | None:
    """The process that has a rank; None if it is not there (yet)."""
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    for pid in children:
        with contextlib.suppress(OSError):  # it just ended
            if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return int(pid)
    return None


def num_lines(directory: Path) -> int:
    """Records so far."""
    path = directory / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])
