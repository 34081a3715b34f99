"""Does the command line work on this device? Each command once, with its exit code and its last lines."""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_parts.lines import Lines

_ROOT = Path(__file__).parents[2]
_LEAST_S = 5.0  # that a command is worth beginning with
_MISSING = re.compile(r"No module named '[^']+'|error: .* needs .*: pip install .*")  # a package that is not installed
_LAST_LINES = 4


@dataclass(frozen=True)
class Command:
    """A command of `hsa-compile` and its share of the time."""

    name: str
    arguments: tuple[str, ...]
    weight: float = 1.0


def commands(device: str, folder: str) -> list[Command]:
    """What is run, in a folder that is thrown away."""
    gpu = device != "cpu"
    steps = "20" if gpu else "2"
    shape = () if gpu else ("--seq-len", "512")
    tune = ("tune", "--device", device, "--op", "forward", "--trials", "5", "--timeout", "20" if gpu else "5", *shape)
    found = [
        Command("doctor", ("doctor",), 0.5),
        Command(
            "generate",
            ("generate", "--model", "tiny", "--prompt", "The grass is green. abc=1234. The sky is blue. ?abc=",
             "--max-new-tokens", "16", "--device", device),
        ),
        Command(
            "eval",
            ("eval", "--model", "tiny", "--lengths", "4k" if gpu else "1k", "--depths", "0.5", "--samples", "2",
             "--device", device, "--out", f"{folder}/evaluation"),
        ),
        Command("tune", tune, 1.5),
        Command("train tiny", ("train", "--preset", "tiny", "--steps", steps, "--out", f"{folder}/tiny"), 2),
    ]  # fmt: skip
    if gpu:  # on a CPU it takes minutes
        train = ("train", "--preset", "small", "--steps", steps, "--out", f"{folder}/small")
        found.append(Command("train small", train, 2))
    return found


def run(out: Path, device: str, seconds: float) -> None:
    """Runs each command that has not succeeded yet."""
    deadline = time.monotonic() + seconds
    lines = Lines(out / "smoke.jsonl")
    done = {row["name"] for row in lines.read() if row["status"] == "ok"}
    with tempfile.TemporaryDirectory() as folder:
        left = [command for command in commands(device, folder) if command.name not in done]
        while left:
            remaining = deadline - time.monotonic()
            limit = max(remaining * left[0].weight / sum(each.weight for each in left), min(remaining, 60.0))
            if limit < _LEAST_S:
                break
            command = left.pop(0)
            row = run_one(command, device, folder, limit)
            lines.append(row)
            print(f"smoke: {row['name']}: {row['status']}", flush=True)


def run_one(command: Command, device: str, folder: str, limit_s: float) -> dict[str, Any]:
    """A line: `ok`, `failed`, `skipped` where a package is missing, or `out of time`."""
    environment = {
        **os.environ,
        "HSA_COMPILE_CACHE_DIR": f"{folder}/cache",
        "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # train takes the first GPU if there is one
    start = time.monotonic()
    code: int | None = None
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        with contextlib.suppress(subprocess.TimeoutExpired):  # the status says so
            code = subprocess.run(
                [sys.executable, "-m", "hsa_compile", *command.arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                timeout=limit_s,
                check=False,
            ).returncode
        output.seek(0)
        text = output.read().strip()
    row = {"name": command.name, "command": " ".join(["hsa-compile", *command.arguments]), "exit": code}
    row |= {"seconds": round(time.monotonic() - start, 1), "last_lines": text.splitlines()[-_LAST_LINES:]}
    if code is None:
        return {**row, "status": "out of time"}
    if code and (missing := _MISSING.search(text)):
        return {**row, "status": "skipped", "reason": missing.group(0)}
    return {**row, "status": "failed" if code else "ok"}
