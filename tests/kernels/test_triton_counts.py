"""What a call costs before any time is measured: its launches, the memory that it allocates, and that it never waits.

The emitted host code runs on tensors without memory (`meta`). Whatever it would read from the device fails there.
"""

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hsa_compile.kernels.compile import compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import default_schedule
from hsa_compile.target import Target

interpreter = pytest.importorskip("triton.runtime.interpreter")

TARGET = Target.parse("sm_90")
GB = 10**9
LARGE = Problem(seq_len=65536, num_heads=32, num_kv_heads=2, head_dim=128, top_k=16, dtype="bfloat16")
LENGTHS = (65536, 1 << 20)
FORWARD = "fused reduce=slots window={} super_tile=8192 segment=64 unroll=8 discard=0 num_warps=4 num_stages=2"
BACKWARD = "fused reduce=atomic window=0 super_tile=2048 segment=256 unroll=8 discard=0 num_warps=8 num_stages=2"
TWO_PASSES = "union dk_dv=together block_tokens=4 num_warps=8 num_stages=2 block_entries=4 chunk_warps=4 chunk_stages=2"


class Costs(TorchDispatchMode):
    """Counts operators that launch a kernel, and the bytes of all storages that are there at once."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.launches: list[str] = []
        self.live: dict[int, int] = {}
        self.known = {x.untyped_storage()._cdata for x in inputs}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if any(x.numel() for x in results) and not (func.is_view or name.startswith(("empty", "new_empty"))):
            self.launches.append(name)
        for storage in (x.untyped_storage() for x in results):
            key = storage._cdata
            if key not in self.known and key not in self.live:
                self.live[key] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, key)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def costs(problem: Problem, monkeypatch: pytest.MonkeyPatch, schedule: str | None = None) -> Costs:
    """One call of the emitted entry, under the default schedule unless another is given."""
    chosen = Schedule.parse(schedule) if schedule else default_schedule(problem, TARGET)
    entry = compile_kernel(emit(problem, chosen, TARGET)).entry
    inputs, options = arguments(problem)
    counted = Costs([x for x in (*inputs, *options.values()) if isinstance(x, Tensor)])
    monkeypatch.setattr(
        interpreter.GridExecutor, "__call__", lambda self, *_, **__: counted.launches.append(self.fn.__name__)
    )
    with counted:
        entry(*inputs, **options)
    return counted


def arguments(problem: Problem) -> tuple[list[Tensor | None], dict[str, Any]]:
    """What `inputs_of` makes, without memory."""
    B, T, S, H, HQ = problem.batch, problem.seq_len, problem.kv_len, problem.num_kv_heads, problem.num_heads
    N, C, K, D = problem.num_chunks, problem.chunk_size, problem.top_k, problem.head_dim
    dtype = getattr(torch, problem.dtype)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    indices, weights = empty(B, T, H, K, dtype=torch.int32), empty(B, T, H, K, dtype=torch.float32)
    if problem.op == "select_chunks":
        return [empty(B, T, H, D), empty(B, N, H, D), None], {"top_k": K, "offset": 0}
    if problem.op == "select_chunks_backward":
        return [empty(B, T, H, D), empty(B, N, H, D), indices, weights], {}
    if problem.op == "hsa_decode":
        pages = [empty(B * N, H, C, D), empty(B * N, H, C, D)]
        table = empty(B, N, dtype=torch.int32)
        return [empty(B, T, HQ, D), *pages, indices, weights], {"scale": 1.0, "page_table": table}
    inputs = [empty(B, T, HQ, D), empty(B, S, H, D), empty(B, S, H, D), indices, weights]
    return [*inputs, *([empty(B, T, HQ, D)] if problem.op == "hsa_backward" else [])], {"scale": 1.0}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("op", "num_kv_heads", "schedule", "most"),
    [
        ("hsa_forward", 2, None, 2),
        ("hsa_forward", 8, None, 9),
        ("hsa_forward", 32, None, 9),
        ("hsa_forward", 8, FORWARD.format(16384), 8),
        ("hsa_backward", 2, None, 14),
        ("hsa_backward", 8, None, 14),
        ("hsa_backward", 32, None, 14),
        ("hsa_backward", 2, BACKWARD, 14),
        ("hsa_backward", 2, TWO_PASSES, 10),
        ("select_chunks", 2, None, 1),
        ("select_chunks_backward", 2, None, 8),
    ],
)
def test_launches_do_not_grow_with_the_length(
    length: int, op: str, num_kv_heads: int, schedule: str | None, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = replace(LARGE, op=op, num_kv_heads=num_kv_heads, seq_len=length, kv_len=length)
    if op.startswith("select"):
        problem = replace(problem, num_heads=2, kv_len=length)
    chosen = Schedule.parse(schedule) if schedule else default_schedule(problem, TARGET)
    windows = -(-length // (chosen.get("window") or length))
    launches = costs(problem, monkeypatch, schedule).launches
    assert 0 < len(launches) <= most * windows
    # The others fill buffers with zeros, or convert results to the dtype of their inputs.
    assert sum(not name.startswith(("zero", "_to_copy")) for name in launches) <= 8 * windows


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("context", [65536, 1 << 24])
def test_a_step_of_decoding_is_at_most_two_launches(batch: int, context: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = replace(LARGE, op="hsa_decode", batch=batch, seq_len=1, kv_len=context, top_k=32, paged=True)
    assert 0 < len(costs(problem, monkeypatch).launches) <= 2


@pytest.mark.parametrize(("num_kv_heads", "most_gb"), [(2, 36), (8, 40), (32, 80)])
def test_a_million_tokens_take_little_beyond_their_inputs_and_results(
    num_kv_heads: int, most_gb: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Single heads have 34 GB of results alone: the output and three gradients."""
    problem = replace(LARGE, num_kv_heads=num_kv_heads, seq_len=LENGTHS[1], kv_len=LENGTHS[1])
    output = problem.seq_len * problem.num_heads * problem.head_dim * problem.itemsize
    assert output <= costs(problem, monkeypatch).peak <= most_gb * GB
    # The output is still there when gradients are computed.
    backward = costs(replace(problem, op="hsa_backward"), monkeypatch).peak
    assert 2 * output <= output + backward <= most_gb * GB


@pytest.mark.parametrize(("window", "batch"), [(16384, 1), (65536, 1), (65536, 32)])
def test_slots_take_the_memory_of_one_window(window: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = replace(LARGE, batch=batch, seq_len=LENGTHS[1] // batch, kv_len=LENGTHS[1] // batch)
    output = LENGTHS[1] * problem.num_heads * problem.head_dim * problem.itemsize
    slots = window * problem.num_heads * problem.top_k * problem.head_dim * problem.itemsize
    peak = costs(problem, monkeypatch, FORWARD.format(window)).peak
    assert output + slots <= peak <= 1.05 * (output + slots)
