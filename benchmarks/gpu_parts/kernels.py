"""What does a call take? The kernels that it launches, one by one, and what Python takes to launch them."""

import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from call_overhead import PUBLIC

from gpu_parts.benches import Timer
from gpu_parts.lines import Lines
from gpu_parts.tuning import entries
from hsa_compile.errors import HSACompileError, UntunedWarning
from hsa_compile.kernels.ops import inputs_of
from hsa_compile.problem import Problem
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.target import Target

_CALLS, _ROUNDS, _IN_A_GRAPH = 100, 7, 20
_DECODES = ((1, 16, 1024), (4, 16, 1024), (64, 16, 1024), (1, 64, 16384), (16, 64, 4096))  # batch, picks, chunks


def short_calls(target: Target) -> list[Problem]:
    """Problems whose kernels take less time than Python does."""
    gpu = target.kind != "cpu"
    shape: dict[str, Any] = {
        "head_dim": 128 if gpu else 16,
        "chunk_size": 64,
        "dtype": "bfloat16" if gpu else "float32",
    }
    heads = {"num_heads": 32 if gpu else 4, "num_kv_heads": 2}
    found = [
        Problem(op="hsa_decode", batch=batch, seq_len=1, kv_len=64 * (chunks if gpu else 64), top_k=picks, paged=True,
                **heads, **shape)
        for batch, picks, chunks in (_DECODES if gpu else _DECODES[:1])
    ]  # fmt: skip
    found.append(Problem(seq_len=512, top_k=4, **heads, **shape))
    found.append(Problem(op="select_chunks", seq_len=512, kv_len=4096, num_heads=2, num_kv_heads=2, top_k=4, **shape))
    return found


def run(out: Path, target: Target, device: str, seconds: float) -> None:
    """A line for the default of each problem that is tuned, and one for each short call, until the time is up."""
    deadline = time.monotonic() + seconds
    lines = Lines(out / "kernels.jsonl")
    done = {row["problem"] for row in lines.read() if "error" not in row}
    timer = Timer(target, device)
    for problem in (*short_calls(target), *(entry.problem for entry in entries(target))):
        if time.monotonic() > deadline:
            break
        row: dict[str, Any] = {"problem": problem.describe(), "op": problem.op}
        if row["problem"] in done:
            continue
        try:
            row |= _short(problem, timer.device) if problem in short_calls(target) else _split(problem, timer, target)
        except HSACompileError as error:
            row["error"] = f"{type(error).__name__}: {error}"[:500]
        lines.append(row)
        print(f"kernels: {row}", flush=True)


def _short(problem: Problem, device: torch.device) -> dict[str, Any]:
    """Microseconds of a call of the public function: what Python takes, and what the device takes in a CUDA graph."""
    arguments, options = inputs_of(problem, device).call(problem)
    public = PUBLIC[problem.op]
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UntunedWarning)
        found: dict[str, Any] = {"call_us": _microseconds(lambda: public(*arguments, **options), device)}
        if device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(_IN_A_GRAPH):
                    public(*arguments, **options)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            found["graph_us"] = round(begin.elapsed_time(end) / _IN_A_GRAPH * 1e3, 2)
    return found


def _microseconds(call: Callable[[], object], device: torch.device) -> float:
    """The time until a call returns, which waits for no kernel; the median of a few rounds."""
    call()
    rounds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        for _ in range(_CALLS):
            call()
        rounds.append((time.perf_counter() - start) / _CALLS * 1e6)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return round(statistics.median(rounds), 1)


def _split(problem: Problem, timer: Timer, target: Target) -> dict[str, Any]:
    """Milliseconds of the default schedule's kernels, by distribution."""
    schedule = SearchSpace.of(problem, target).default()
    timer.load(problem)
    row = {"schedule": str(schedule), **timer.time(schedule, float("inf"))}
    return row | {"kernels": timer.kernels(schedule)} if target.kind != "cpu" else row
