"""Plants faults in a copy of this repository, one at a time, and names the test that finds each.

`python tests/planted_faults.py ['NAME GLOB'] [--fast] [--whole] [--json FILE]`. The faults are in
`planted_faults.toml`. Each is first given to the fast suite, within the test files that it names; what that misses goes
to the default suite, of which the fast one is a part. The exit code is 1 if a fault was not found. The tests are taken
to pass without a fault: what fails anyway would be taken for a find.
"""

import argparse
import contextlib
import fnmatch
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from tabulate import tabulate

ROOT = Path(__file__).parents[1]
FAULTS = Path(__file__).with_suffix(".toml")

FAST, DEFAULT = "not slow and not exhaustive", "not exhaustive"  # what `pytest -m` takes for the two suites

_TIMEOUT_S = 1200  # of one run of pytest; a fault may make a loop endless
_FAILED, _NONE_CHOSEN = 1, 5  # exit codes of pytest
# What a typo in `replace` raises: a program that does not run is no fault that a test found.
_BROKEN = r"(SyntaxError|IndentationError|NameError|UnboundLocalError|ImportError|UndefinedError|CompileError)\b"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One slip: `find` stands once in `file` and becomes `replace`; `tests` should notice, the cheapest first."""

    name: str
    file: str
    find: str
    replace: str
    tests: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Find:
    """What became of a fault.

    Attributes:
        fault: its name.
        suite: `fast`, `default`, or empty if no test failed.
        test: the first that failed, or why no run counts.
        reason: what that test said.
        seconds: that pytest took, all runs together.
    """

    fault: str
    suite: str
    test: str
    reason: str
    seconds: float


def read_faults() -> list[Fault]:
    """All faults, in the order of the file."""
    with FAULTS.open("rb") as file:
        return [Fault(**entry) for entry in tomllib.load(file)["fault"]]


def copy_repository(to: Path) -> None:
    """Copies the tracked files as they are in the working tree."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def run_tests(copy: Path, expression: str, tests: Sequence[str]) -> tuple[str, str]:
    """Runs pytest in a copy, with every cache in a folder of this run alone.

    Returns:
        the first test that failed and what it said; for a run that does not count, no test and why; both empty if
        all passed.
    """
    with tempfile.TemporaryDirectory(dir=copy.parent, prefix="run-") as caches:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--tb=no", "-n", "0", "-p", "no:cacheprovider"]
        command += ["--basetemp", f"{caches}/pytest", "-m", expression, *tests]
        environment = {
            **os.environ,
            "PYTHONPATH": str(copy),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HSA_COMPILE_CACHE_DIR": f"{caches}/hsa-compile",
            "TRITON_CACHE_DIR": f"{caches}/triton",
            "TMPDIR": caches,
            "COLUMNS": "400",
        }
        # In a session of its own, so that what the tests started ends with them.
        with subprocess.Popen(
            command, cwd=copy, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            try:
                output, _ = process.communicate(timeout=_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                return "", f"no end within {_TIMEOUT_S} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    return _read(process.returncode, output)


def _read(code: int, output: str) -> tuple[str, str]:
    if code in (0, _NONE_CHOSEN):
        return "", ""
    failed = re.search(r"^FAILED (\S+::.+?)(?: - (.*))?$", output, re.MULTILINE)
    if code != _FAILED or failed is None:
        lines = output.strip().splitlines()
        return "", f"pytest left with {code}: {next((line for line in lines if line.startswith('ERROR')), lines[-1:])}"
    test, reason = failed[1], failed[2] or ""
    if re.search(_BROKEN, reason):
        return "", f"the fault does not run: {reason}"
    return test, reason


def try_fault(copy: Path, fault: Fault, *, only_fast: bool, whole: bool) -> Find:
    """Plants one fault in a copy, looks for it, and takes it out again."""
    path = copy / fault.file
    sound = path.read_bytes()
    text = sound.decode()
    if text.count(fault.find) != 1:
        raise SystemExit(f"{fault.name!r}: its text stands {text.count(fault.find)} times in {fault.file}, not once")
    runs = [("fast", FAST, fault.tests)]
    if not only_fast:
        runs.append(("default", DEFAULT, fault.tests))
    if whole:
        runs.append(("default", DEFAULT, ["tests"]))
    start = time.monotonic()
    why = ""
    path.write_text(text.replace(fault.find, fault.replace), encoding="utf-8")
    try:
        for suite, expression, tests in runs:
            test, reason = run_tests(copy, expression, tests)
            if test:
                return Find(fault=fault.name, suite=suite, test=test, reason=reason, seconds=time.monotonic() - start)
            why = why or reason
    finally:
        path.write_bytes(sound)
    return Find(fault=fault.name, suite="", test="", reason=why, seconds=time.monotonic() - start)


def try_faults(faults: Sequence[Fault], *, only_fast: bool, whole: bool) -> Iterator[Find]:
    """Tries faults one after the other in one copy, which is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="planted-faults-") as folder:
        copy = Path(folder, "repository")
        copy_repository(copy)
        for fault in faults:
            yield try_fault(copy, fault, only_fast=only_fast, whole=whole)


def table(finds: Sequence[Find]) -> str:
    """One line a fault."""
    rows = [
        (find.fault, find.test or f"NOTHING {find.reason}".strip(), "yes" if find.suite == "fast" else "no")
        for find in finds
    ]
    return tabulate(rows, headers=("fault", "found by", "in the fast suite too"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("glob", nargs="?", default="*", help="names of faults to try; all if it is left out")
    parser.add_argument("--fast", action="store_true", help="run the fast suite only")
    parser.add_argument("--whole", action="store_true", help="run the whole suite where a fault's own tests all pass")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found to a file, too")
    chosen = parser.parse_args()
    faults = [fault for fault in read_faults() if fnmatch.fnmatchcase(fault.name, chosen.glob)]
    if not faults:
        parser.error(f"no fault has a name like {chosen.glob!r}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    finds: list[Find] = []
    try:
        for find in try_faults(faults, only_fast=chosen.fast, whole=chosen.whole):
            finds.append(find)
            print(f"{len(finds)}/{len(faults)} {find.fault}: {find.test or 'NOTHING'} {find.reason}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    print(table(finds))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps([asdict(find) for find in finds], indent=1) + "\n", encoding="utf-8")
    missed = [find for find in finds if not find.test]
    print(f"\n{len(finds) - len(missed)} of {len(finds)} found, {len(faults) - len(finds)} not tried")
    return 1 if missed or len(finds) < len(faults) else 0


if __name__ == "__main__":
    sys.exit(main())
