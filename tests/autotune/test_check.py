"""A wrong kernel must not be timed: real kernels whose results are spoilt in one place each."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hsa_compile.errors import WrongResult
from hsa_compile.kernels.compare import TOLERANCES, relative_error
from hsa_compile.kernels.compile import Kernel, compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.kernels.hsa_attention.check import RESULT_NAMES
from hsa_compile.kernels.hsa_attention.inputs import Inputs, make_inputs
from hsa_compile.kernels.ops import check
from hsa_compile.problem import DTYPES, Problem
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import Target

FORWARD = Problem(seq_len=1001, num_heads=4, num_kv_heads=2, head_dim=16, chunk_size=16, top_k=4)
BACKWARD = FORWARD.with_op("hsa_backward")
CPU = torch.device("cpu")

Spoil = Callable[[tuple[Tensor, ...], bool], None]


@lru_cache
def inputs_of(problem: Problem) -> Inputs:
    return make_inputs(problem, CPU)


def kernel_of(problem: Problem) -> Kernel:
    block = 16 if problem.seq_len >= 16 else 1
    return compile_kernel(emit(problem, Schedule.of("token", block_tokens=block), Target.parse("cpu")))


def spoilt(problem: Problem, spoil: Spoil) -> Kernel:
    """A right kernel whose results `spoil` changes in place; it is told whether the shape is the full one."""
    kernel = kernel_of(problem)

    def entry(q: Tensor, *arguments: Tensor, **options: Any) -> Any:
        results = kernel.entry(q, *arguments, **options)
        spoil(results if isinstance(results, tuple) else (results,), q.shape[1] == problem.seq_len)
        return results

    return replace(kernel, entry=entry)


def on_full(change: Callable[[tuple[Tensor, ...]], Any]) -> Spoil:
    def spoil(results: tuple[Tensor, ...], full: bool) -> None:
        if full:
            change(results)

    return spoil


def on_small(change: Callable[[tuple[Tensor, ...]], Any]) -> Spoil:
    def spoil(results: tuple[Tensor, ...], full: bool) -> None:
        if not full:
            change(results)

    return spoil


def assert_refused(problem: Problem, spoil: Spoil, match: str) -> None:
    with pytest.raises(WrongResult, match=match) as caught:
        check(spoilt(problem, spoil), problem, inputs_of(problem))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("problem", [FORWARD, BACKWARD], ids=lambda problem: problem.op)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_kernel_passes(problem: Problem, dtype: str) -> None:
    problem = replace(problem, dtype=dtype)
    check(kernel_of(problem), problem, inputs_of(problem))


@pytest.mark.parametrize(
    "fields",
    [
        {"seq_len": 1},
        {"seq_len": 7, "kv_len": 1001},
        {"seq_len": 1001, "kv_len": 40},
        {"seq_len": 9},
        {"batch": 3, "seq_len": 130},
        {"softmax_off_by_one": True, "per_head_weights": True},
        {"top_k": 100},
    ],
    ids=lambda fields: "-".join(f"{name}={value}" for name, value in fields.items()),
)
@pytest.mark.parametrize("problem", [FORWARD, BACKWARD], ids=lambda problem: problem.op)
def test_a_right_kernel_passes_on_odd_shapes(problem: Problem, fields: dict[str, Any]) -> None:
    problem = replace(problem, **{"kv_len": 0, **fields})
    problem = replace(problem, kv_len=problem.kv_len or problem.seq_len)
    check(kernel_of(problem), problem, inputs_of(problem))


def test_a_wrong_output_is_refused_with_the_error_and_what_is_allowed() -> None:
    assert_refused(FORWARD, lambda results, full: results[0].mul_(1.01), r"o is off by 1\.0e-02 .*at most 1e-05")


@pytest.mark.parametrize("name", RESULT_NAMES["hsa_backward"])
def test_a_single_wrong_gradient_is_refused_by_name(name: str) -> None:
    place = RESULT_NAMES["hsa_backward"].index(name)
    assert_refused(BACKWARD, lambda results, full: results[place].mul_(1.01), f"^{name} is off")
    assert_refused(BACKWARD, on_full(lambda results: results[place].mul_(1.01)), f"^{name} is off")


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("problem", [FORWARD, BACKWARD], ids=lambda problem: problem.op)
def test_a_single_value_that_is_not_finite_is_refused_wherever_it_is(problem: Problem, value: float) -> None:
    names = RESULT_NAMES[problem.op]
    for place, name in enumerate(names):
        for row in (0, 5, 333, 1000):
            assert_refused(problem, on_full(lambda r, p=place, t=row: r[p][0, t, 0, 0].fill_(value)), f"^{name} ")
        assert_refused(problem, on_small(lambda r, p=place: r[p][0, 5, 0, 0].fill_(value)), f"^{name} ")


def test_an_output_wrong_only_in_the_far_rows_of_the_full_problem_is_refused() -> None:
    assert_refused(FORWARD, on_full(lambda results: results[0][:, 900:].zero_()), "o is off .* sampled tokens")
    assert_refused(FORWARD, on_full(lambda results: results[0][:, -1:].zero_()), "o is off .* sampled tokens")


@pytest.mark.parametrize("name", ["dq", "dw"])
def test_a_token_gradient_wrong_only_in_far_rows_is_refused(name: str) -> None:
    place = RESULT_NAMES["hsa_backward"].index(name)
    assert_refused(BACKWARD, on_full(lambda results: results[place][:, 900:].zero_()), f"{name} is off")


@pytest.mark.parametrize("name", ["dk", "dv"])
def test_a_key_gradient_wrong_only_in_the_far_chunks_is_refused(name: str) -> None:
    place = RESULT_NAMES["hsa_backward"].index(name)
    last = int(inputs_of(BACKWARD).chunk_indices.max()) * BACKWARD.chunk_size
    assert_refused(BACKWARD, on_full(lambda results: results[place][:, last:].zero_()), f"{name} is off")


def test_rows_that_see_nothing_must_be_zero() -> None:
    assert_refused(FORWARD, on_small(lambda results: results[0][:, 0].fill_(1.0)), "o is off .* small odd shape")


def test_a_result_of_another_shape_is_refused() -> None:
    kernel = kernel_of(FORWARD)
    cut = replace(kernel, entry=lambda *arguments, **options: kernel.entry(*arguments, **options)[:, :, :, 1:])
    with pytest.raises(WrongResult, match=r"o has shape \[1, 201, 4, 15\], not \[1, 201, 4, 16\]"):
        check(cut, FORWARD, inputs_of(FORWARD))


def test_the_relative_error_is_a_ratio_of_norms() -> None:
    ones = torch.ones(3, 7)
    assert relative_error(1.5 * ones, ones) == pytest.approx(0.5)
    assert relative_error(ones, ones) == 0
    assert relative_error(torch.full((2,), 1e-3), torch.zeros(2)) == pytest.approx(1e-3 * 2**0.5)
    assert relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")


def test_every_dtype_has_a_tolerance() -> None:
    assert set(TOLERANCES) == set(DTYPES)
