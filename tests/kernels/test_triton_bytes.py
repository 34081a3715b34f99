"""The bytes that the cost model says a schedule moves, against those that its kernels ask for in the interpreter."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hsa_compile.kernels.compile import compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.kernels.ops import inputs_of
from hsa_compile.peaks import limits_of
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.target import Target

interpreter = pytest.importorskip("triton.runtime.interpreter")

TARGET = Target.parse("sm_90")
ATOMIC = 3  # an addition in the cache takes its operand, reads, and writes
INDEX_KERNELS = {"_count_picks", "_sort_picks", "_sum_blocks", "_spread_picks", "_cut_tiles", "_list_visits"}


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts the bytes of each kernel's loads, stores and atomics: of an instruction, each address once."""
    counted: Counter[str] = Counter()
    running: list[str] = []
    builder, grid = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, atomic, launch = (
        builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw, grid.__call__,
    )  # fmt: skip

    def count(pointers: Any, mask: Any, times: int = 1) -> None:
        places = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)]
        size = np.unique(places).size if times == 1 else places.size
        counted[running[-1]] += times * size * pointers.get_element_ty().primitive_bitwidth // 8

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_atomic(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask, ATOMIC)
        return atomic(self, operation, pointers, value, mask, *rest)

    def counted_launch(self: Any, *arguments: Any, **options: Any) -> Any:
        running.append(self.fn.__name__)
        launch(self, *arguments, **options)
        running.pop()

    with monkeypatch.context() as patch:
        patch.setattr(builder, "create_masked_load", counted_load)
        patch.setattr(builder, "create_masked_store", counted_store)
        patch.setattr(builder, "create_atomic_rmw", counted_atomic)
        patch.setattr(grid, "__call__", counted_launch)
        yield counted


def overlapping(problem: Problem) -> Tensor:
    """Picks [B, T, H, K] of which each token shares the half with all others, and picks the rest at random."""
    B, T, H, K, N = problem.batch, problem.seq_len, problem.num_kv_heads, problem.top_k, problem.num_chunks
    order = torch.rand(B, T, H, N - K // 2, generator=torch.Generator().manual_seed(0)).argsort(dim=3)
    own = order[..., : K - K // 2] + K // 2
    shared = torch.arange(K // 2).expand(B, T, H, -1)
    return torch.cat([shared, own], dim=3).to(torch.int32)


def ratio(problem: Problem, text: str, monkeypatch: pytest.MonkeyPatch, indices: Tensor | None = None) -> float:
    """The bytes that the model says, over those that are counted; building the lists of picks is left out."""
    schedule = Schedule.parse(text)
    space = SearchSpace.of(problem, TARGET)
    assert space.why_invalid(schedule) is None
    inputs = inputs_of(problem, torch.device("cpu"))
    if indices is not None:
        inputs = replace(inputs, **{"landmark_indices" if problem.selects else "chunk_indices": indices})
    entry = compile_kernel(emit(problem, schedule, TARGET)).entry
    with counting(monkeypatch) as counted:
        entry(*inputs.arguments(problem.op), **inputs.options(problem.op))
    passes = space.op_backend.passes
    said = (
        sum(one.cache_bytes for one in passes(problem, schedule, limits_of(TARGET)))
        if passes
        else space.work(schedule).cache_bytes
    )
    found = sum(size for name, size in counted.items() if name not in INDEX_KERNELS)
    return said / found


def uniform(problem: Problem) -> Tensor:
    """Picks [B, T, H, K] at random, none twice."""
    shape = (problem.batch, problem.seq_len, problem.num_kv_heads, problem.num_chunks)
    order = torch.rand(shape, generator=torch.Generator().manual_seed(0)).argsort(dim=3)
    return order[..., : problem.top_k].to(torch.int32)


PROBLEM = Problem(
    seq_len=21,
    kv_len=11 * 18,
    num_heads=6,
    num_kv_heads=2,
    head_dim=40,
    value_dim=72,
    chunk_size=18,
    top_k=5,
    dtype="float32",
)
SECOND = "dk_dv={} block_entries=16 chunk_warps=4 chunk_stages=1"


@pytest.mark.parametrize(
    ("op", "schedule"),
    [
        ("hsa_forward", "token num_warps=4 num_stages=2"),
        ("hsa_forward", "union block_tokens=4 num_warps=4 num_stages=2"),
        ("hsa_forward", "chunk reduce=atomic segment=128 block_entries=16 num_warps=4 num_stages=2 super_tile=0"),
        ("hsa_forward", "chunk reduce=slots segment=128 block_entries=16 num_warps=4 num_stages=2 super_tile=0"),
        (
            "hsa_forward",
            "fused reduce=fused window=0 super_tile=128 segment=16 unroll=8 discard=0 num_warps=4 num_stages=2",
        ),
        (
            "hsa_forward",
            "fused reduce=slots window=0 super_tile=128 segment=32 unroll=8 discard=0 num_warps=4 num_stages=2",
        ),
        ("hsa_backward", "token num_warps=4 num_stages=2 " + SECOND.format("together")),
        ("hsa_backward", "union block_tokens=4 num_warps=4 num_stages=2 " + SECOND.format("apart")),
        ("hsa_backward", "chunk reduce=atomic segment=128 block_entries=16 num_warps=4 num_stages=2 super_tile=0"),
        ("hsa_backward", "chunk reduce=slots16 segment=128 block_entries=16 num_warps=4 num_stages=1 super_tile=0"),
        ("hsa_backward", "chunk reduce=slots segment=0 block_entries=16 num_warps=4 num_stages=2 super_tile=0"),
        *(
            (
                "hsa_backward",
                f"fused reduce={reduce} window=0 super_tile=128 segment=16 unroll=8 discard=0 num_warps=4 num_stages=2",
            )
            for reduce in ("fused", "slots", "atomic")
        ),
    ],
)
def test_attention_moves_the_bytes_that_the_model_says(op: str, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = replace(PROBLEM, op=op, dtype="bfloat16" if "slots16" in schedule else "float32")
    if schedule.startswith("union"):
        problem = replace(problem, top_k=6, kv_len=64 * 18, num_heads=3, num_kv_heads=1)
    indices = overlapping(problem) if schedule.startswith("union") else uniform(problem)
    assert 0.9 <= ratio(problem, schedule, monkeypatch, indices) <= 1.1


SELECT = Problem(
    op="select_chunks",
    seq_len=93,
    kv_len=93,
    num_heads=2,
    num_kv_heads=2,
    head_dim=40,
    chunk_size=3,
    top_k=5,
    dtype="float32",
)


@pytest.mark.parametrize(
    ("change", "schedule"),
    [
        ({}, "stream block_tokens=16 block_n=16 selection=insert num_warps=4 num_stages=2"),
        ({"head_dim": 200}, "stream block_tokens=16 block_n=32 selection=merge num_warps=4 num_stages=2"),
        ({}, "split block_tokens=16 block_n=16 selection=insert num_warps=4 num_stages=2 num_splits=4"),
        (
            {"landmarks_per_chunk": 4, "seq_len": 186, "kv_len": 186},
            "stream block_tokens=16 block_n=32 selection=insert num_warps=4 num_stages=2",
        ),
        ({"op": "select_chunks_backward"}, "token block_tokens=4 num_warps=4"),
        ({"op": "select_chunks_backward"}, "chunk block_tokens=4 num_warps=4 chunk_t=8 chunk_warps=4"),
    ],
)
def test_selection_moves_the_bytes_that_the_model_says(
    change: dict[str, Any], schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = replace(SELECT, **change)
    indices = uniform(problem) if problem.op != "select_chunks" else None
    assert 0.9 <= ratio(problem, schedule, monkeypatch, indices) <= 1.1


@pytest.mark.parametrize(("change", "splits"), [({}, 1), ({"paged": True}, 4), ({"top_k": 3, "num_heads": 2}, 2)])
def test_decoding_moves_the_bytes_that_the_model_says(
    change: dict[str, Any], splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = replace(PROBLEM, op="hsa_decode", batch=3, seq_len=2, **change)
    assert (
        0.9
        <= ratio(problem, f"split num_splits={splits} num_warps=4 num_stages=2", monkeypatch, uniform(problem))
        <= 1.1
    )
