"""Is every kernel right on this device? Every op, dataflow, dtype and option first, then what chance draws."""

import json
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gpu_parts.lines import Lines
from gpu_parts.pool import Outcome, Pool
from hsa_compile.autotune.bench.bench import launch_errors, prepare
from hsa_compile.errors import InvalidSchedule, WrongResult
from hsa_compile.kernels.compare import TOLERANCES, relative_error
from hsa_compile.kernels.compile import compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.kernels.hsa_attention.check import RESULT_NAMES
from hsa_compile.kernels.hsa_attention.inputs import make_inputs
from hsa_compile.kernels.hsa_attention.op import global_indices
from hsa_compile.kernels.hsa_attention.reference import hsa_attention_reference
from hsa_compile.kernels.ops import inputs_of
from hsa_compile.problem import ALL_OPS, DISTRIBUTIONS, SELECT_OPS, Problem
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.target import Target

DTYPES = ("bfloat16", "float16", "float32")
GROUPS = (16, 4, 1)
LIMIT_S = 45.0  # for one case: some float32 kernels take minutes to compile
# A kernel that does not fit, or takes long to compile, is not wrong: a search passes it over.
NOT_WRONG = ("ok", "OutOfResources", "TimedOut", "CompileTimedOut")

Case = dict[str, Any]  # problem, schedule, seed: all that is needed to repeat it

_MEMORY_SHARE = 0.05  # of the GPU that one worker may take
_MOST_GATHERED = 800_000_000  # bytes, of which a backward pass takes about three times as many
_OPTIONS = {
    "hsa_forward": ("softmax_off_by_one", "per_head_weights", "mask_last_token", "packed", "deterministic"),
    "hsa_backward": ("softmax_off_by_one", "per_head_weights", "mask_last_token", "packed", "deterministic"),
    "select_chunks": ("noise", "deterministic"),
    "select_chunks_backward": ("deterministic",),
    "hsa_decode": ("softmax_off_by_one", "per_head_weights", "mask_last_token", "paged", "deterministic"),
}


class Checker:
    """The bench of a worker: checks kernels on small inputs.

    Args:
        target: what kernels are made for.
        device: where they run, as PyTorch names it.
    """

    def __init__(self, target: Target, device: str) -> None:
        self.target, self.device = target, torch.device(device)
        torch.set_num_threads(1)
        if self.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(_MEMORY_SHARE)

    def hello(self) -> None:
        """Shows that the device can be used."""
        torch.zeros(1, device=self.device)

    def check(self, case: Case) -> None:
        """Compares one kernel with the float64 reference.

        Raises:
            CompileError, OutOfResources, WrongResult: what is the matter with it.
        """
        problem, schedule = Problem(**case["problem"]), Schedule.parse(case["schedule"])
        try:
            if problem.packed:
                _check_packed(problem, schedule, self.target, self.device, case["seed"])
            else:
                self._check(problem, schedule, case["seed"])
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _check(self, problem: Problem, schedule: Schedule, seed: int) -> None:
        inputs = inputs_of(problem, self.device, distribution=DISTRIBUTIONS[seed % len(DISTRIBUTIONS)], seed=seed)
        call = prepare(problem, schedule, self.target, inputs).call
        if problem.deterministic and not all(map(torch.equal, _tensors(call()), _tensors(call()))):
            raise WrongResult("two runs of a deterministic schedule differ")


def _tensors(results: Any) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _check_packed(problem: Problem, schedule: Schedule, target: Target, device: torch.device, seed: int) -> None:
    """Three sequences in a batch of one, the second too short for a chunk: the tuner's check knows only one."""
    T, C = problem.seq_len, problem.chunk_size
    first = T // 2
    lengths = [first, min(C - 1, T - first), T - first - min(C - 1, T - first)]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    inputs = make_inputs(problem, device, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    chunks = torch.tensor([length // C for length in lengths for _ in range(length)]).view(1, -1, 1, 1)
    shape = (1, T, problem.num_kv_heads, problem.top_k)
    picks = ((torch.rand(shape, generator=generator) * (chunks + 1)).int() - 1).to(device)
    leaves = [x.double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.chunk_weights)]
    options = {name: getattr(problem, name) for name in ("chunk_size", "softmax_off_by_one", "mask_last_token")}
    expected = hsa_attention_reference(*leaves[:3], picks, leaves[3], cu_seqlens=bounds, **options)
    wanted: tuple[torch.Tensor, ...] = (expected.detach(),)
    if problem.op == "hsa_backward":
        wanted = torch.autograd.grad(expected, leaves, inputs.grad_o.double(), materialize_grads=True)
    numbered, starts = global_indices(picks, bounds, T, C)
    entry = compile_kernel(emit(problem, schedule, target)).entry
    arguments = inputs.with_indices(numbered).arguments(problem.op)
    with launch_errors("cpp" if device.type == "cpu" else "triton"):
        results = _tensors(entry(*arguments, scale=problem.head_dim**-0.5, chunk_starts=starts))
    for name, actual, right in zip(RESULT_NAMES[problem.op], results, wanted, strict=True):
        error = relative_error(actual, right)
        if not error <= TOLERANCES[problem.dtype]:
            raise WrongResult(f"{name} is off by {error:.1e} on packed sequences of {lengths}")


def cases(target: Target, seed: int = 0) -> Iterator[Case]:
    """Every default, then every dataflow and option, then pairs drawn at random without end."""
    seen = set()
    for case in (*_defaults(target), *_listed(target, random.Random(seed))):
        text = json.dumps(case, sort_keys=True)
        if text not in seen:
            seen.add(text)
            yield case
    draw = random.Random(seed + 1)
    while True:
        if (drawn := _drawn(target, draw)) is not None:
            yield drawn


def _defaults(target: Target) -> Iterator[Case]:
    for op in ALL_OPS:
        for dtype in DTYPES:
            for group in GROUPS:
                problem = _small(op, dtype, group)
                yield _case(problem, SearchSpace.of(problem, target).default())


def _listed(target: Target, draw: random.Random) -> Iterator[Case]:
    """One schedule of each dataflow for every dtype and group, and for every option."""
    problems = [_small(op, dtype, group) for op in ALL_OPS for dtype in DTYPES for group in GROUPS]
    for op in ALL_OPS:
        changes = [{name: True} for name in _OPTIONS[op]]
        changes += [{"fusion": "stick_breaking"}, {"landmarks_per_chunk": 8}] if op in SELECT_OPS else []
        problems += [replace(_small(op, "bfloat16", group), **change) for change in changes for group in GROUPS[:2]]
    for problem in problems:
        for dataflow in SearchSpace.of(problem, target).choices:
            schedule = draw_schedule(problem, target, draw, dataflow)
            if schedule is not None:
                yield _case(problem, schedule)


def _drawn(target: Target, draw: random.Random) -> Case | None:
    """Any problem with any of its schedules; None where the draw has none."""
    op, group, heads = draw.choice(ALL_OPS), draw.choice((1, 2, 3, 4, 8, 16, 32)), draw.choice((1, 2, 3))
    attends = op not in SELECT_OPS
    seq_len = draw.randint(1, 16) if op == "hsa_decode" else draw.randint(1, 512)
    options = {name: draw.random() < 0.25 for name in _OPTIONS[op]}
    packed = options.get("packed", False)
    chunk_size = draw.choice((16, 32, 64, 64, 128, 40))
    head_dim = draw.choice((16, 40, 64, 128, 128, 192, 256))
    problem = Problem(
        op=op,
        batch=1 if packed else draw.choice((1, 2)),
        seq_len=seq_len,
        kv_len=seq_len if packed else chunk_size + draw.randint(0, 700),
        num_heads=heads * group if attends else heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        value_dim=draw.choice((head_dim, 64)) if attends else head_dim,
        chunk_size=chunk_size,
        top_k=draw.choice((1, 3, 8, 16)),
        landmarks_per_chunk=draw.choice((1, 1, 2, 16)) if not attends else 1,
        dtype=draw.choice(("bfloat16", "bfloat16", "float16", "float32")),
        fusion=draw.choice(("softmax", "stick_breaking")) if not attends else "softmax",
        **options,
    )
    if problem.per_head_weights and group == 1:  # the two shapes of weights are then one
        problem = replace(problem, per_head_weights=False)
    while _gathered_bytes(problem) > _MOST_GATHERED:
        problem = replace(problem, top_k=problem.top_k // 2)
    schedule = draw_schedule(problem, target, draw, draw.choice(list(SearchSpace.of(problem, target).choices)))
    return None if schedule is None else _case(problem, schedule, seed=draw.randrange(1000))


def _gathered_bytes(problem: Problem) -> int:
    """What the float64 reference gathers for the small odd shape of a check, which is of 200 tokens."""
    if problem.selects or problem.top_k == 1:
        return 0
    rows = problem.batch * min(problem.seq_len, 201) * problem.num_kv_heads * problem.top_k * problem.chunk_size
    return rows * (problem.head_dim + problem.value_dim) * 8


def draw_schedule(problem: Problem, target: Target, draw: random.Random, dataflow: str) -> Schedule | None:
    """A valid schedule of a dataflow, or None if a hundred draws find none."""
    space = SearchSpace.of(problem, target)
    knobs = space.choices[dataflow]
    for _ in range(100):
        schedule = Schedule.of(dataflow, **{name: draw.choice(values) for name, values in knobs.items()})
        if space.is_valid(schedule):
            return schedule
    return None


def _small(op: str, dtype: str, group: int) -> Problem:
    """The most used head dim and chunk size on few tokens of an odd number."""
    attends, decodes = op not in SELECT_OPS, op == "hsa_decode"
    return Problem(
        op=op,
        batch=2 if decodes else 1,
        seq_len=3 if decodes else 389,
        kv_len=640 if decodes else 389,
        num_heads=2 * group if attends else 2,
        num_kv_heads=2,
        head_dim=128,
        chunk_size=64 if attends else 16,
        top_k=4,
        dtype=dtype,
    )


def _case(problem: Problem, schedule: Schedule, seed: int = 0) -> Case:
    return {"problem": problem.to_dict(), "schedule": str(schedule), "seed": seed}


def run(out: Path, target: Target, device: str, seconds: float) -> None:
    """Checks until the time is up; a line for each case."""
    deadline = time.monotonic() + seconds
    lines = Lines(out / "correctness.jsonl")
    done = {json.dumps(row["case"], sort_keys=True) for row in lines.read()}

    def on_outcome(arguments: tuple[Case], outcome: Outcome) -> None:
        (case,) = arguments
        row = row_of(case, outcome, device)
        lines.append(row)
        if row["failed"]:
            print(f"FAILED {outcome['status']}: {outcome['error']}\n  {row['repeat']}", flush=True)

    left = ((case,) for case in cases(target) if json.dumps(case, sort_keys=True) not in done)
    with Pool("gpu_parts.correctness:Checker", (target, device)) as pool:
        pool.map("check", left, limit_s=LIMIT_S, deadline=deadline, on_outcome=on_outcome)
    rows = lines.read()
    print(f"correctness: {len(rows)} cases, {sum(row['failed'] for row in rows)} failed", flush=True)


def row_of(case: Case, outcome: Outcome, device: str) -> dict[str, Any]:
    """A line of the file: the case, what became of it, and how to repeat one that failed."""
    failed = outcome["status"] not in NOT_WRONG
    row = {"case": case, "failed": failed, **{name: outcome.get(name) for name in ("status", "seconds", "error")}}
    command = f"python benchmarks/gpu.py --device {device.split(':')[0]} --repeat '{json.dumps(case)}'"
    return {**row, "repeat": command} if failed else row


def repeat(text: str, target: Target, device: str) -> Outcome:
    """Runs one case in this process.

    Raises:
        InvalidSchedule: the text is no case.
        HSACompileError: what is the matter with the kernel.
    """
    try:
        case = json.loads(text)
        case = {name: case[name] for name in ("problem", "schedule", "seed")}
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidSchedule(f"--repeat {text!r} is not a case as a failure prints it ({error})") from error
    Checker(target, device).check(case)
    return {"status": "ok"}
