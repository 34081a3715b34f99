"""Do the tests pass that only a GPU can run? Each of them once, with a line for it the moment that it has ended."""

import functools
import importlib.util
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from gpu_parts.lines import Lines

_ROOT = Path(__file__).parents[2]
TESTS = "tests/test_on_gpu.py"
_ENDED = re.compile(r"^(\S+::.*\S) (PASSED|FAILED|ERROR|SKIPPED)\b")
_WHY = re.compile(r"^(?:FAILED|ERROR) (\S+::.*?) - (.*)$")  # in pytest's summary, which comes last


def why_not() -> str:
    """Why they cannot run here; nothing if they can."""
    return "" if importlib.util.find_spec("pytest") else "pytest is not installed"


def run(out: Path, seconds: float) -> None:
    """Runs each test that has not passed yet."""
    lines = Lines(out / "tests.jsonl")
    known: dict[str, dict[str, Any]] = {row["test"]: row for row in lines.read()}
    # The options of `pyproject.toml` need plugins. Other tests interpret kernels; these compile them.
    command = [sys.executable, "-m", "pytest", "-v", "-o", "addopts=", "-m", "gpu", "--tb=line", TESTS]
    for test, row in known.items():
        if row["status"] == "passed":
            command += ["--deselect", test]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1", "COLUMNS": "400"}
    popen = functools.partial(subprocess.Popen, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    with popen(command, cwd=_ROOT, env=environment) as process:
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        begun = time.monotonic()
        for line in process.stdout:
            if ended := _ENDED.match(line):
                seconds = round(time.monotonic() - begun, 1)
                row = {"test": ended[1], "status": ended[2].lower(), "seconds": seconds, "error": ""}
                print(f"tests: {row['test']}: {row['status']}", flush=True)
                begun = time.monotonic()
            elif why := _WHY.match(line):
                again = f"TRITON_INTERPRET=0 pytest -m gpu -n 0 '{why[1]}'"
                row = {**known[why[1]], "error": why[2], "repeat": again}
                print(f"tests: {row['error']}\n  {again}", flush=True)
            else:
                continue
            known[row["test"]] = row
            lines.append(row)
        timer.cancel()
