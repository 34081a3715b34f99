"""Chunk selection in the tuner: inputs, check, and a short search."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hsa_compile.autotune.tune import tune
from hsa_compile.cli.options import expand
from hsa_compile.errors import WrongResult
from hsa_compile.kernels.compile import Kernel, compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.kernels.select_chunks.check import check_select
from hsa_compile.kernels.select_chunks.inputs import make_select_inputs
from hsa_compile.problem import SELECT_OPS, Problem
from hsa_compile.schedules.space import default_schedule
from hsa_compile.target import Target

CPU = replace(Target.parse("cpu"), has_compiler=False)
FORWARD = Problem(op="select_chunks", seq_len=300, num_heads=2, num_kv_heads=2, head_dim=16, chunk_size=16, top_k=3)
BACKWARD = FORWARD.with_op("select_chunks_backward")


def kernel_of(problem: Problem) -> Kernel:
    return compile_kernel(emit(problem, default_schedule(problem, CPU), CPU))


@pytest.mark.parametrize("op", SELECT_OPS)
@pytest.mark.parametrize("distribution", ["random", "local", "hot"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_right_kernel_passes(op: str, distribution: str, dtype: str) -> None:
    for fusion, noise, landmarks in (("softmax", True, 1), ("stick_breaking", False, 4)):
        problem = replace(FORWARD, op=op, dtype=dtype, fusion=fusion, noise=noise, landmarks_per_chunk=landmarks)
        inputs = make_select_inputs(problem, torch.device("cpu"), distribution=distribution)
        check_select(kernel_of(problem), problem, inputs)


def spoil_weight(indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return indices, weights * 1.001


def spoil_pick(indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The most recent visible chunk in place of the first pick."""
    positions = torch.arange(indices.shape[1])
    newest = (positions // 16 - 1).clamp(max=17).to(torch.int32).view(1, -1, 1)
    return torch.cat([newest.expand(*indices.shape[:3])[..., None], indices[..., 1:]], dim=3), weights


def spoil_order(indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(indices[..., 2:] >= 0, indices.flip(3), indices), weights


def spoil_visibility(indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return indices + (indices >= 0).int() * 17, weights


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_weight, "chunk_weights is off by 1.0e-03"),
        (spoil_pick, "left out scores|do not fall"),
        (spoil_order, "do not fall"),
        (spoil_visibility, "not visible"),
    ],
)
def test_a_wrong_forward_is_named(spoil, message: str) -> None:
    kernel = kernel_of(FORWARD)
    wrong = replace(kernel, entry=lambda *x, **y: spoil(*kernel.entry(*x, **y)))
    with pytest.raises(WrongResult, match=message):
        check_select(wrong, FORWARD, make_select_inputs(FORWARD, torch.device("cpu")))


def test_a_landmark_that_is_not_the_best_of_its_chunk_is_named() -> None:
    problem = replace(FORWARD, landmarks_per_chunk=2)
    kernel = kernel_of(problem)

    def other_landmark(*arguments: Tensor, **options: int) -> tuple[Tensor, Tensor]:
        picks, weights = kernel.entry(*arguments, **options)
        return torch.where(picks < 0, -1, picks ^ 1), weights

    with pytest.raises(WrongResult, match="not the best of its chunk"):
        check_select(replace(kernel, entry=other_landmark), problem, make_select_inputs(problem, torch.device("cpu")))


@pytest.mark.parametrize("name", ["dquery", "dlandmarks"])
def test_a_wrong_gradient_is_named(name: str) -> None:
    kernel, factors = kernel_of(BACKWARD), (1.001, 1.0) if name == "dquery" else (1.0, 1.001)
    wrong = replace(kernel, entry=lambda *x: tuple(f * g for f, g in zip(factors, kernel.entry(*x), strict=True)))
    with pytest.raises(WrongResult, match=f"{name} is off by 1.0e-03"):
        check_select(wrong, BACKWARD, make_select_inputs(BACKWARD, torch.device("cpu")))


@pytest.mark.parametrize("op", SELECT_OPS)
def test_a_short_search_gives_a_record(op: str) -> None:
    record = tune(FORWARD.with_op(op), trials=2, timeout=600, isolate=False)
    assert record.trials == 2
    assert not record.failures
    assert record.schedule.dataflow in ("stream", "token")


def test_selection_has_one_head_for_each_kv_head() -> None:
    (problem,) = expand(CPU, {"num_heads": [16], "num_kv_heads": [2]}, SELECT_OPS[:1])
    assert (problem.op, problem.num_heads, problem.num_kv_heads) == ("select_chunks", 2, 2)
