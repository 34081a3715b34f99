"""Everything that is worth knowing of a GPU, in one command: `make gpu`, or

    python benchmarks/gpu.py --out DIR                      # 12 minutes on the first GPU
    python benchmarks/gpu.py --out DIR --dry-run            # says what it would do, and for how long
    python benchmarks/gpu.py --out DIR --device cpu --minutes 3    # a smaller run, with a CPU in the GPU's place
    python benchmarks/gpu.py --repeat '<case>'              # a failure once more, as the run printed it

Six parts, the most useful first, each in a process of its own with a share of the time: the tests that need a GPU
(tests; where pytest is installed), whether every kernel is right (correctness), the schedules of a list of problems
(tune), what each kernel takes and what Python does (kernels), the ops against PyTorch's attention (race), the command
line (smoke). Every result is in DIR the moment it is
known, and the same command goes on where an earlier one ended.
`DIR/pretuned.json` holds the winners as a file for `hsa_compile/schedules/pretuned/`.
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "benchmarks")]  # a checkout need not be installed

from gpu_parts import tests  # noqa: E402
from gpu_parts.lines import Lines  # noqa: E402

GRACE_S = 20.0  # after its share of the time, before a part is killed
_PR_SET_PDEATHSIG = 1
CACHE_VARIABLE = "HSA_COMPILE_CACHE_DIR"


@dataclass(frozen=True)
class Part:
    """A part of the run.

    Attributes:
        name: as `--parts` takes it.
        share: of the minutes; what a part leaves over goes to those after it.
        what: for people.
    """

    name: str
    share: float
    what: str


PARTS = (
    Part("tests", 0.10, "the tests that only a GPU can run"),
    Part("correctness", 0.15, "every op, dataflow, dtype and option against the float64 reference, then random cases"),
    Part("tune", 0.30, "compiles on all cores, then times alone; winners in pretuned.json"),
    Part("kernels", 0.05, "the time of each kernel of the default schedules, and of Python in short calls"),
    Part("race", 0.20, "forward, and forward with backward, against PyTorch's flash, cuDNN and FlexAttention"),
    Part("smoke", 0.20, "doctor, tune, train, eval and generate of the command line"),
)


def plan(minutes: float, names: list[str]) -> list[tuple[Part, float]]:
    """The parts that can run, with their seconds."""
    chosen = [part for part in PARTS if part.name in names and not (part.name == "tests" and tests.why_not())]
    total = sum(part.share for part in chosen)
    return [(part, 60 * minutes * part.share / total) for part in chosen]


def run(parts: list[tuple[Part, float]], command: list[str], out: Path) -> None:
    """Runs each part in its process; what one leaves of its time, or overruns, the later ones gain or lose."""
    deadline = time.monotonic() + sum(seconds for _, seconds in parts)
    for index, (part, planned) in enumerate(parts):
        left = deadline - time.monotonic()
        seconds = left * planned / sum(each for _, each in parts[index:])
        last_call = min(seconds + GRACE_S, left + 5)
        print(f"== {part.name}: {seconds / 60:.1f} minutes", flush=True)
        start = time.monotonic()
        code = run_part([*command, "--part", part.name, "--until", f"{time.time() + seconds:.1f}"], last_call)
        ended = {"part": part.name, "exit": code, "seconds": round(time.monotonic() - start, 1)}
        write_summary(out, ended)


def run_part(command: list[str], limit_s: float) -> int | str:
    """The exit code of a process, or `killed` after so many seconds, with all that it started."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return "killed"
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended, with all that it started
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def write_summary(out: Path, ended: dict[str, Any]) -> None:
    """`summary.md` and `gpu_<device>.json`, from what is in the folder by now."""
    runs = Lines(out / "run.jsonl")
    runs.append({"kind": "part", **ended})
    rows = {part.name: Lines(out / f"{part.name}.jsonl").read() for part in PARTS}
    about = next((row for row in reversed(runs.read()) if row["kind"] == "device"), {"slug": "unknown"})
    merged = {**about, "date": now(), "parts": [row for row in runs.read() if row["kind"] == "part"]}
    # Of what was run twice, the last.
    merged["tests"] = list({row["test"]: row for row in rows["tests"]}.values())
    merged["correctness"] = {
        "statuses": dict(Counter(row["status"] for row in rows["correctness"])),
        "failed": [row for row in rows["correctness"] if row["failed"]],
    }
    merged["tune"] = [row for row in rows["tune"] if row["kind"] in ("winner", "final")]
    results = [row for row in rows["race"] if row["kind"] == "result"]
    merged["race"] = list({(row["heat"], row["kind_of_case"], row["contender"]): row for row in results}.values())
    merged["kernels"] = list({row["problem"]: row for row in rows["kernels"]}.values())
    merged["smoke"] = rows["smoke"]
    text = json.dumps(merged, indent=1, ensure_ascii=False)
    (out / f"gpu_{about['slug']}.json").write_text(text + "\n", encoding="utf-8")
    (out / "summary.md").write_text(markdown(merged), encoding="utf-8")


def markdown(merged: dict[str, Any]) -> str:
    """The run as tables for people."""
    found = [f"# {merged.get('device', 'no device')}, {merged['date']}", ""]
    found += table(["part", "exit", "seconds"], [[p["part"], p["exit"], p["seconds"]] for p in merged["parts"]])
    statuses = Counter(row["status"] for row in merged["tests"])
    found += ["## Tests", "", ", ".join(f"{count} {name}" for name, count in statuses.items()) or "none", ""]
    for row in merged["tests"]:
        if row["error"]:
            found += [f"- {row['status']}: {row['error']}", f"  `{row['repeat']}`"]
    statuses = merged["correctness"]["statuses"]
    found += [
        "",
        "## Correctness",
        "",
        ", ".join(f"{count} {name}" for name, count in statuses.items()) or "no cases",
        "",
    ]
    for row in merged["correctness"]["failed"]:
        found += [f"- {row['status']}: {row['error']}", f"  `{row['repeat']}`"]
    winners = [row for row in merged["tune"] if row["kind"] == "winner"]
    body = [
        [row["problem"], row["schedule"], f"{row['ms']:.3f}", f"{row['speedup']:.2f}", row["trials"],
         sum(row["failures"].values())]
        for row in winners
    ]  # fmt: skip
    found += ["", "## Tuned schedules", ""]
    found += table(["problem", "schedule", "ms", "default / this", "trials", "failed"], body)
    found += ["## Race", ""]
    body = []
    for row in merged["race"]:
        median = f"{row['measurement']['median_ms']:.3f}" if row["measurement"] else row["status"]
        ratio = f"{row['ratio'][0]:.2f}" if row["ratio"] else ""
        tflops = f"{row['tflops']:.3g}" if row["tflops"] else ""
        note = "" if row["measurement"] else row["note"][:120]
        body.append([row["heat"], row["kind_of_case"], row["contender"], median, ratio, tflops, note])
    found += table(["shape and picks", "op", "contender", "median ms", "time / ours", "TFLOP/s", "note"], body)
    body = [
        [row["problem"], f"{row['call_us']:.1f}", row.get("graph_us", "")]
        for row in merged["kernels"]
        if "call_us" in row
    ]
    found += ["## Short calls", "", *table(["problem", "µs until it returns", "µs in a CUDA graph"], body)]
    found += ["## Kernels of the default schedules", ""]
    body = [
        [row["problem"], name, f"{ms:.3f}", f"{row['kernels']['trained'].get(name, 0):.3f}"]
        for row in merged["kernels"]
        for name, ms in row.get("kernels", {}).get("random", {}).items()
    ]
    found += table(["problem", "kernel", "ms (random)", "ms (trained)"], body)
    body = [
        [row["name"], row["status"], row["exit"], row["seconds"], (row["last_lines"] or [""])[-1][:120]]
        for row in merged["smoke"]
    ]
    found += ["## Command line", "", *table(["command", "status", "exit", "seconds", "last line"], body)]
    return "\n".join(found) + "\n"


def table(headers: list[str], rows: list[list[Any]]) -> list[str]:
    """Lines of a Markdown table, and an empty one."""
    body = [headers, ["---"] * len(headers), *rows]
    return [*("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in body), ""]


def now() -> str:
    """ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def run_here(given: argparse.Namespace) -> None:
    """One part, heat or case, in this process: what the others are started for."""
    if sys.platform == "linux":  # else a part would go on after whoever started it was killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    import torch

    from hsa_compile.target import Target

    device = "cuda:0" if given.device == "cuda" else given.device
    target = Target.of(torch.device(device))
    if given.repeat:
        from gpu_parts.correctness import repeat

        repeat(given.repeat, target, device)
        print("ok")
        return
    if given.heat:
        from gpu_parts.race import run_heat

        run_heat(given.heat, given.out, target, device, given.until - time.time(), given.contender)
        return
    from hsa_compile.versions import installed_versions

    about = {"slug": target.slug, "device": f"{target.name} ({target.arch}, {target.num_cores} cores)"}
    Lines(given.out / "run.jsonl").append({"kind": "device", **about, "versions": installed_versions()})
    seconds = given.until - time.time()
    if given.part == "tests":
        tests.run(given.out, seconds)
    elif given.part == "correctness":
        from gpu_parts.correctness import run as run_correctness

        run_correctness(given.out, target, device, seconds)
    elif given.part == "tune":
        from gpu_parts.tuning import run as run_tuning

        run_tuning(given.out, target, device, seconds)
    elif given.part == "kernels":
        from gpu_parts.kernels import run as run_kernels

        run_kernels(given.out, target, device, seconds)
    elif given.part == "race":
        from gpu_parts.race import run as run_race

        run_race(given.out, target, device, seconds, given.contender)
    else:
        from gpu_parts.smoke import run as run_smoke

        run_smoke(given.out, device, seconds)


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=12.0, help="for all parts together")
    parser.add_argument("--out", type=Path, help="folder of the results; a second run with the same goes on")
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", default=",".join(names), help="which of them, with commas between")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and do nothing")
    parser.add_argument("--contender", action="append", default=[], metavar="FILE.py:FUNCTION",
                        help="a function for the race that is called as hsa_attention is; may be repeated")  # fmt: skip
    parser.add_argument("--repeat", metavar="CASE", help="check one case again, as a failure printed it")
    for name in ("--part", "--heat"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # by time.time()
    given = parser.parse_args(words)
    given.parts = given.parts.split(",")
    if unknown := [name for name in given.parts if name not in names]:
        parser.error(f"--parts names {unknown[0]!r}; allowed are {', '.join(names)}")
    if not given.minutes > 0:
        parser.error(f"--minutes {given.minutes} must be more than 0")
    if given.out is None and not given.repeat and not given.dry_run:
        parser.error("--out is missing: the folder of the results")
    return given


def main() -> None:
    """Runs what the command line asks for."""
    words = sys.argv[1:]
    given = parse(words)
    if given.dry_run:
        if "tests" in given.parts and (why := tests.why_not()):
            print(f"  0.0 minutes  tests: left out, since {why}")
        for part, seconds in plan(given.minutes, given.parts):
            print(f"{seconds / 60:5.1f} minutes  {part.name}: {part.what}")
        return
    if given.out is not None:
        given.out = given.out.resolve()
        given.out.mkdir(parents=True, exist_ok=True)
    # Neither the user's cache, nor in the folder of the results, which is to be carried away: kernels are many files.
    folder = hashlib.sha256(str(given.out).encode()).hexdigest()[:12]
    os.environ[CACHE_VARIABLE] = str(Path(tempfile.gettempdir()) / f"hsa-compile-gpu-{folder}")
    if given.repeat or given.part or given.heat:
        from hsa_compile.errors import HSACompileError, InvalidArgument

        try:
            run_here(given)
        except HSACompileError as error:
            print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
            sys.exit(2 if isinstance(error, InvalidArgument) else 1)
        return
    command = [sys.executable, str(Path(__file__).resolve()), "--device", given.device, "--out", str(given.out)]
    for contender in given.contender:
        command += ["--contender", contender]
    run(plan(given.minutes, given.parts), command, given.out)
    print(f"results in {given.out}: {', '.join(sorted(path.name for path in given.out.iterdir()))}")


if __name__ == "__main__":
    main()
