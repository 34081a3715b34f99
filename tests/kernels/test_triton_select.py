"""The emitted Triton kernels of chunk selection: interpreted against the reference, and compiled for absent GPUs."""

import itertools
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from in_turn import in_turn
from torch import Tensor

from hsa_compile import select_chunks
from hsa_compile.kernels.compare import relative_error
from hsa_compile.kernels.compile import compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.kernels.gumbel import noise_keys
from hsa_compile.kernels.select_chunks.reference import select_chunks_reference, select_weights_reference
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.target import Target

pytest.importorskip("triton")

HOPPER = Target.parse("sm_90")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
FORWARD = [
    Schedule.of(flow, block_tokens=16, block_n=16, selection=selection, num_warps=4, num_stages=2, **more)
    for flow, more in (("stream", {}), ("split", {"num_splits": 4}))
    for selection in ("insert", "merge")
]
BACKWARD = [
    Schedule.of("token", block_tokens=4, num_warps=4),
    Schedule.of("chunk", block_tokens=2, num_warps=4, chunk_t=8, chunk_warps=4),
]


def problem(op: str, *, T: int, N: int, D: int, K: int, C: int = 1, R: int = 1, **more: Any) -> Problem:
    return Problem(
        op=op, batch=2, seq_len=max(T, 1), kv_len=max(N * C, 1), num_heads=2, num_kv_heads=2, head_dim=D, chunk_size=C,
        landmarks_per_chunk=R, top_k=K, **more,
    )  # fmt: skip


def tensors(T: int, N: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Whole numbers: their products are exact, and equal scores are common."""
    random = torch.Generator().manual_seed(T + N + D)
    return tuple(torch.randint(-2, 3, (2, n, 2, D), generator=random).to(dtype) for n in (T, N))  # type: ignore[return-value]


CASES = [
    {"T": 21, "N": 19, "D": 16, "K": 3, "C": 1, "R": 1, "offset": 0},
    {"T": 1, "N": 39, "D": 20, "K": 5, "C": 2, "R": 1, "offset": 101},
    {"T": 3, "N": 4, "D": 200, "K": 8, "C": 2, "R": 1, "offset": 2**33},  # K > N, several slices of D, large positions
    {"T": 19, "N": 11, "D": 20, "K": 3, "C": 2, "R": 4, "offset": 3},
    {"T": 2, "N": 5, "D": 16, "K": 2, "C": 2, "R": 2, "offset": 9},
]


WEIGHTED = [(case, *how) for case in CASES for how in (("softmax", None), ("stick_breaking", 7))]


@pytest.mark.parametrize(("case", "schedule"), in_turn(WEIGHTED, FORWARD, 2), ids=str)
def test_picks_and_weights_equal_the_reference(
    case: tuple[dict[str, int], str, int | None], schedule: Schedule
) -> None:
    sizes, fusion, seed = case
    T, N, D, K, C, R, offset = sizes.values()
    query, landmarks = tensors(T, N * R, D, torch.float32)
    keys = noise_keys(seed, 2, 2, torch.arange(T) + offset) if seed is not None else None
    wanted = problem("select_chunks", T=T, N=N, D=D, K=K, C=C, R=R, fusion=fusion, noise=seed is not None)
    entry = compile_kernel(emit(wanted, schedule, HOPPER)).entry
    picks, weights = entry(query, landmarks, keys, top_k=K, offset=offset)
    of_chunks = landmarks.double().unflatten(1, (N, R))
    expected, expected_weights = select_chunks_reference(
        query.double(), of_chunks, chunk_size=C, top_k=K, offset=offset, fusion=fusion, noise_seed=seed
    )
    assert torch.equal(picks.div(R, rounding_mode="floor").int(), expected)
    # Each pick is the landmark whose score the chunk has, the first of equals.
    chunk = expected.clamp(min=0).long()
    batch, head = torch.arange(2).view(2, 1, 1, 1), torch.arange(2).view(2, 1)
    scores = torch.einsum("bthd,bthkrd->bthkr", query.double(), of_chunks.transpose(2, 3)[batch, chunk, head])
    assert torch.equal(picks, torch.where(expected < 0, -1, chunk * R + scores.argmax(-1)).int())
    # Where there is noise it is taken off again, which costs a last digit.
    assert relative_error(weights, expected_weights) <= 1e-5


@pytest.mark.parametrize("schedule", FORWARD[2:], ids=str)
def test_a_pick_is_found_in_each_part_of_the_landmarks(schedule: Schedule) -> None:
    best = [13, 29, 45, 61]  # one of each part of 16
    query, landmarks = torch.ones(2, 1, 2, 16), torch.zeros(2, 64, 2, 16)
    landmarks[:, best] = 1.0
    entry = compile_kernel(emit(problem("select_chunks", T=1, N=64, D=16, K=4), schedule, HOPPER)).entry
    indices, _ = entry(query, landmarks, None, top_k=4, offset=64)
    assert indices.sort(dim=-1).values.flatten().tolist() == best * 4


@pytest.mark.parametrize("masked", [[2, 3], [0, 1, 2, 3, 4, 5]], ids=str)
@pytest.mark.parametrize("schedule", FORWARD, ids=str)
@pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning", "ignore:invalid value:RuntimeWarning")
def test_a_score_of_minus_infinity_is_never_picked(schedule: Schedule, masked: list[int]) -> None:
    query, landmarks = tensors(8, 12, 16, torch.float32)
    query[..., 0] = 1.0
    landmarks[:, :, :, 0].view(2, 6, 2, 2)[:, masked] = float("-inf")
    landmarks[:, 2, :, 0] = float("-inf")  # a chunk of which one landmark is left
    several = landmarks.unflatten(1, (6, 2))
    expected, weights = select_chunks_reference(query, several, chunk_size=1, top_k=4)
    assert not torch.isin(expected, torch.tensor(masked)).any()
    wanted = problem("select_chunks", T=8, N=6, D=16, K=4, R=2)
    found = compile_kernel(emit(wanted, schedule, HOPPER)).entry(query, landmarks, None, top_k=4, offset=0)
    for indices, actual in ((found[0] >> 1, found[1]), select_chunks(query, several, chunk_size=1, top_k=4)):
        assert torch.equal(indices, expected)
        torch.testing.assert_close(actual, weights)


KINDS = [(schedule, fusion) for fusion in ("softmax", "stick_breaking") for schedule in BACKWARD]
SIZES = [(16, 3, torch.float32), (200, 5, torch.float32), (16, 3, torch.bfloat16), (200, 5, torch.float16)]


@pytest.mark.parametrize(("sizes", "kind"), in_turn(SIZES, KINDS, 2), ids=str)
def test_gradients_equal_the_reference(sizes: tuple[int, int, torch.dtype], kind: tuple[Schedule, str]) -> None:
    (D, K, dtype), (schedule, fusion) = sizes, kind
    query, landmarks = tensors(7, 6, D, dtype)
    leaves = [x.double().requires_grad_() for x in (query, landmarks)]
    indices, _ = select_chunks_reference(query, landmarks, chunk_size=1, top_k=K)
    grad = torch.randn(indices.shape, generator=torch.Generator().manual_seed(0))
    weights = select_weights_reference(*leaves, indices, fusion=fusion)
    expected = torch.autograd.grad(weights, leaves, grad.double())
    name = str(dtype).removeprefix("torch.")
    wanted = problem("select_chunks_backward", T=7, N=6, D=D, K=K, fusion=fusion, dtype=name)
    results = compile_kernel(emit(wanted, schedule, HOPPER)).entry(query, landmarks, indices, grad)
    for one, other in zip(results, expected, strict=True):
        assert one.dtype == dtype
        assert relative_error(one, other) <= (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("fusion", ["softmax", "stick_breaking"])
def test_large_scores_stay_finite(fusion: str) -> None:
    query, landmarks = tensors(20, 18, 16, torch.float32)
    wanted = problem("select_chunks", T=20, N=18, D=16, K=4, fusion=fusion)
    indices, weights = compile_kernel(emit(wanted, FORWARD[0], HOPPER)).entry(
        1e4 * query, landmarks, None, top_k=4, offset=0
    )
    expected = select_weights_reference(1e4 * query.double(), landmarks.double(), indices, fusion=fusion)
    assert relative_error(weights, expected) <= 1e-3
    wanted = problem("select_chunks_backward", T=20, N=18, D=16, K=4, fusion=fusion)
    for result in compile_kernel(emit(wanted, BACKWARD[0], HOPPER)).entry(1e4 * query, landmarks, indices, weights):
        assert result.isfinite().all()


def test_a_deterministic_problem_rules_out_atomics_and_float64_has_no_schedule() -> None:
    wanted = problem("select_chunks_backward", T=64, N=64, D=64, K=8, deterministic=True)
    assert {s.dataflow for s in SearchSpace.of(wanted, HOPPER).schedules()} == {"chunk"}
    for op in ("select_chunks", "select_chunks_backward"):
        wanted = problem(op, T=64, N=64, D=64, K=8, dtype="float64")
        assert not list(SearchSpace.of(wanted, HOPPER).schedules())


SCRIPT = """
import json, sys
from dataclasses import asdict
from hsa_compile.kernels.ahead_of_time import compile_launches
from hsa_compile.kernels.compile import compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.problem import Problem
from hsa_compile.schedules.space import default_schedule
from hsa_compile.target import Target

rows = []
for arch, (seq_len, head_dim, top_k, more) in json.loads(sys.argv[1]):
    target = Target.parse(arch)
    for op in ("select_chunks", "select_chunks_backward"):
        problem = Problem(op=op, seq_len=seq_len, kv_len=65536, num_heads=2, num_kv_heads=2, head_dim=head_dim,
                          top_k=top_k, **{"dtype": "bfloat16", **more})
        source = emit(problem, default_schedule(problem, target), target)
        for kernel in compile_launches(compile_kernel(source).module, target):
            row = asdict(kernel)
            row.pop("asm")
            rows.append({"arch": arch, "shape": [seq_len, head_dim, top_k, more], **row})
print(json.dumps(rows))
"""
COMPILED_SHAPES = [
    (65536, 64, 8, {}),
    (65536, 128, 16, {"fusion": "stick_breaking", "landmarks_per_chunk": 4}),
    (65536, 128, 32, {"noise": True}),
    (1, 128, 16, {}),
    (65536, 1024, 64, {"fusion": "stick_breaking", "noise": True}),
    (65536, 64, 8, {"dtype": "float32"}),
]


@pytest.mark.slow
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_default_schedules_compile_for_four_gpus_without_spills(every: bool) -> None:
    in_turns = zip(TARGETS, COMPILED_SHAPES, strict=False)
    points = list(itertools.product(TARGETS, COMPILED_SHAPES) if every else in_turns)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(points)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert {row["name"] for row in rows} == {
        "_select_chunks_stream", "_select_chunks_part", "_select_chunks_merge", "_select_chunks_dquery",
        "_select_chunks_dlandmarks", "_sort_picks", "_sum_blocks", "_spread_picks",
    }  # fmt: skip
    assert {row["arch"] for row in rows} == set(TARGETS)
    for row in rows:
        assert row["spills"] == 0, row
        assert row["shared_memory"] <= Target.parse(row["arch"]).shared_memory, row
        if row["name"] in ("_select_chunks_stream", "_select_chunks_part") and "dtype" not in row["shape"][3]:
            assert row["matrix_instruction"] != "none", row
