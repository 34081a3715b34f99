"""The op against the float64 reference on this CPU: outputs and all four gradients."""

import itertools
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from corners import corners
from torch import Tensor

from hsa_compile import Problem, Schedule, Target, hsa_attention, hsa_attention_reference
from hsa_compile.errors import InvalidArgument
from hsa_compile.kernels.compare import TOLERANCES, relative_error
from hsa_compile.kernels.compile import compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.kernels.hsa_attention.op import global_indices
from hsa_compile.paths import cxx_compiler
from hsa_compile.problem import DTYPES

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")

CPU = Target.parse("cpu")
WITHOUT_COMPILER = replace(CPU, has_compiler=False)


@dataclass(frozen=True)
class Shape:
    B: int = 2
    T: int = 37
    S: int = 101
    HQ: int = 6
    H: int = 2
    D: int = 24
    Dv: int = 24
    C: int = 16
    K: int = 3
    off_by_one: bool = False
    per_head: bool = False
    logits: float = 1.0

    def __str__(self) -> str:
        text = f"B{self.B}-T{self.T}-S{self.S}-HQ{self.HQ}-H{self.H}-D{self.D}-Dv{self.Dv}-C{self.C}-K{self.K}"
        return text + "-off_by_one" * self.off_by_one + "-per_head" * self.per_head + f"-x{self.logits:g}"


ODD = Shape(T=613, S=613, HQ=4, H=1, C=7, K=5, D=20, Dv=12)
WIDE = Shape(HQ=48, H=3, D=16, Dv=40, C=19, S=133, off_by_one=True, per_head=True)  # G = 16, D ≠ Dv
OPTIONS = Shape(HQ=8, H=2, off_by_one=True, per_head=True)
SHAPES = [
    # One C++ kernel serves these …
    Shape(),
    Shape(T=1, S=517, K=8),
    Shape(T=101, S=33, K=7),  # K beyond the chunks, T > S
    Shape(logits=1e4),
    # … one these …
    WIDE,
    replace(WIDE, logits=1e4),
    # … and each of these has one of its own.
    ODD,
    Shape(HQ=3, H=3, per_head=True),  # G = 1
    Shape(HQ=16, H=1, D=64, Dv=64, C=64, S=300),
    Shape(B=1, T=1, S=16, HQ=1, H=1, K=1),
    Shape(off_by_one=True),
    OPTIONS,
    Shape(logits=1e4, off_by_one=True),
]


@dataclass(frozen=True)
class Arguments:
    q: Tensor
    k: Tensor
    v: Tensor
    indices: Tensor
    weights: Tensor
    grad_o: Tensor
    options: dict

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        tensors = (self.q, self.k, self.v, self.weights)
        return [x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in tensors]

    def run(self, op, dtype: torch.dtype | None = None, **more) -> list[Tensor]:
        """Output and the gradients of q, k, v and the weights."""
        q, k, v, weights = leaves = self.leaves(dtype)
        o = op(q, k, v, self.indices, weights, **self.options, **more)
        return [o.detach(), *torch.autograd.grad(o, leaves, self.grad_o.to(o.dtype))]


def arguments(shape: Shape, dtype: torch.dtype) -> Arguments:
    """Random picks with empty slots, empty rows and duplicates; NaN where weights must never be read."""
    torch.manual_seed(zlib.crc32(str(shape).encode()))
    N = shape.S // shape.C
    indices = torch.randint(-1, N, (shape.B, shape.T, shape.H, shape.K), dtype=torch.int32)
    if shape.T > 3:
        indices[:, 2::7] = -1  # not the last row of a super-tile, which is the one that a wrong bound loses
    if shape.K > 1:
        indices[:, ::4, :, 1] = indices[:, ::4, :, 0]
    weights = torch.rand(shape.B, shape.T, shape.HQ if shape.per_head else shape.H, shape.K)
    if not shape.per_head:
        weights[indices < 0] = float("nan")
    q = torch.randn(shape.B, shape.T, shape.HQ, shape.D) * shape.logits**0.5
    k = torch.randn(shape.B, shape.S, shape.H, shape.D) * shape.logits**0.5
    return Arguments(
        q=q.to(dtype),
        k=k.to(dtype),
        v=torch.randn(shape.B, shape.S, shape.H, shape.Dv).to(dtype),
        indices=indices,
        weights=weights.to(torch.float64 if dtype == torch.float64 else torch.float32),
        grad_o=torch.randn(shape.B, shape.T, shape.HQ, shape.Dv).to(dtype),
        options={"chunk_size": shape.C, "softmax_off_by_one": shape.off_by_one},
    )


def assert_close(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype, loosened: float = 1.0) -> None:
    tolerance = loosened * TOLERANCES[str(dtype).removeprefix("torch.")]
    for name, one, other in zip(("o", "dq", "dk", "dv", "dw"), actual, expected, strict=True):
        assert torch.isfinite(one).all(), name
        assert relative_error(one, other) <= tolerance, name


def family_cases() -> list[Any]:
    """PyTorch in every dtype and shape, C++ in every shape and vector extension: to build that takes a second each."""
    slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive
    cases = [(shape, "torch", getattr(torch, dtype)) for shape in SHAPES for dtype in DTYPES]
    for number, shape in enumerate(SHAPES):
        marks = [] if number < 4 else [exhaustive]
        cases.append(pytest.param(shape, "cpp-own", torch.float32, marks=marks))
        marks = [] if number in (4, 5) else [slow] if number < 8 else [exhaustive]
        cases.append(pytest.param(shape, "cpp", torch.float32, marks=marks))
        marks = [slow] if number < 3 else [exhaustive]
        cases.append(pytest.param(shape, "cpp", torch.bfloat16, marks=marks))
    return cases


@pytest.mark.parametrize(("shape", "family", "dtype"), family_cases(), indirect=["family"], ids=str)
def test_output_and_gradients_equal_the_reference(shape: Shape, family: str, dtype: torch.dtype) -> None:
    given = arguments(shape, dtype)
    expected = given.run(hsa_attention_reference, torch.float64)
    # At 1e4 even float64 knows a logit to 1e-12 only, and near ties multiply that.
    loosened = shape.logits if dtype == torch.float64 else 1.0
    assert_close(given.run(hsa_attention), expected, dtype, loosened)


TARGETS = {
    "torch": WITHOUT_COMPILER,
    "cpp": CPU,
    "avx2": replace(CPU, arch="avx2"),
    "scalar": replace(CPU, arch="scalar"),
}


def schedule_cases() -> list[Any]:
    shapes = [ODD, OPTIONS, Shape(T=500, S=1300, HQ=4, H=2, K=6)]
    cases = [(shape, "torch") for shape in shapes]
    for shape, name in itertools.product(shapes, ("cpp", "avx2", "scalar")):
        mark = pytest.mark.slow if (shape, name) == (ODD, "avx2") else pytest.mark.exhaustive
        cases.append(pytest.param(shape, name, marks=mark))
    return cases


@pytest.mark.parametrize(("shape", "name"), schedule_cases(), ids=str)
def test_every_schedule_gives_the_same_answer_forward_and_backward(shape: Shape, name: str) -> None:
    if name != "torch" and cxx_compiler() is None:
        pytest.skip("there is no C++ compiler")
    given = arguments(shape, torch.float32)
    o, *gradients = given.run(hsa_attention_reference, torch.float64)
    scale = shape.D**-0.5
    for op, expected in (("hsa_forward", [o]), ("hsa_backward", gradients)):
        problem = Problem(
            op=op, batch=shape.B, seq_len=shape.T, kv_len=shape.S, num_heads=shape.HQ, num_kv_heads=shape.H,
            head_dim=shape.D, value_dim=shape.Dv, chunk_size=shape.C, top_k=shape.K,
            softmax_off_by_one=shape.off_by_one, per_head_weights=shape.per_head,
        )  # fmt: skip
        for schedule in corners(problem, TARGETS[name]):
            entry = compile_kernel(emit(problem, schedule, TARGETS[name])).entry
            inputs = [given.q, given.k, given.v, given.indices, given.weights]
            if op == "hsa_backward":
                inputs.append(given.grad_o)
            results = entry(*inputs, scale=scale)
            for actual, wanted in zip(results if op == "hsa_backward" else [results], expected, strict=True):
                assert relative_error(actual, wanted) <= 1e-5, schedule


@pytest.mark.parametrize(
    "shape",
    [Shape(B=1, T=4, S=8, HQ=2, H=1, D=3, Dv=4, C=4), Shape(B=1, T=3, S=9, HQ=2, D=2, Dv=2, C=3, off_by_one=True)],
)
def test_gradcheck(shape: Shape) -> None:
    given = arguments(shape, torch.float64)
    weights = torch.where(torch.isnan(given.weights), 0.5, given.weights)
    leaves = [x.detach().clone().requires_grad_() for x in (given.q, given.k, given.v, weights)]
    assert torch.autograd.gradcheck(
        lambda q, k, v, w: hsa_attention(q, k, v, given.indices, w, **given.options), leaves
    )


def test_int64_indices_and_strided_inputs_are_accepted() -> None:
    given = arguments(Shape(), torch.float32)
    strided = hsa_attention(
        given.q.transpose(1, 2).contiguous().transpose(1, 2),
        given.k.transpose(1, 2).contiguous().transpose(1, 2),
        given.v.repeat(1, 1, 1, 2)[..., : given.v.shape[3]],
        given.indices.long(),
        given.weights,
        **given.options,
    )
    assert torch.equal(strided, given.run(hsa_attention)[0])


@pytest.mark.parametrize("scale", [0.7, -0.7, 0.0])
def test_a_scale_of_ones_own_is_used(scale: float, scales_in_kernels: list[float]) -> None:
    given = arguments(Shape(), torch.float32)
    expected = given.run(hsa_attention_reference, torch.float64, scale=scale)
    assert_close(given.run(hsa_attention, scale=scale), expected, torch.float32)
    assert scales_in_kernels == [abs(scale)] * 2  # forward and backward: a kernel takes no negative one


@pytest.mark.parametrize("empty", ["rows", "no slots", "no tokens", "no whole chunk"])
def test_nothing_to_attend_to_gives_zeros_that_have_gradients(empty: str) -> None:
    T, S, K = (
        (0 if empty == "no tokens" else 5),
        (7 if empty == "no whole chunk" else 32),
        (0 if empty == "no slots" else 2),
    )
    q, k, v = (torch.randn(1, n, heads, 24, requires_grad=True) for n, heads in ((T, 6), (S, 2), (S, 2)))
    weights = torch.full((1, T, 2, K), float("nan"), requires_grad=True)
    o = hsa_attention(q, k, v, torch.full((1, T, 2, K), -1), weights, chunk_size=16)
    assert o.shape == (1, T, 6, 24)
    assert not o.any()
    for gradient in torch.autograd.grad(o.sum(), (q, k, v, weights)):
        assert not gradient.any()


def test_only_the_gradients_that_are_asked_for_come_back() -> None:
    given = arguments(Shape(), torch.float32)
    q, k, v, weights = given.leaves()
    k.requires_grad_(False)
    hsa_attention(q, k, v, given.indices, weights, **given.options).sum().backward()
    assert k.grad is None
    assert v.grad is not None


@pytest.fixture
def three_threads() -> Iterator[None]:
    """More than the one that tests have by default, so that parts of several workers come together."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("family", ["cpp"], indirect=True)
def test_several_threads_give_the_right_answer_and_the_same_bits_twice(family: str) -> None:
    given = arguments(Shape(T=1300, S=1300), torch.float32)
    first, second = given.run(hsa_attention, deterministic=True), given.run(hsa_attention, deterministic=True)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert_close(first, given.run(hsa_attention_reference, torch.float64), torch.float32)


TORCH_SCHEDULES = [Schedule.of("chunk", super_tile=512, tile_rows=256), Schedule.of("token", block_tokens=16)]


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("schedule", TORCH_SCHEDULES, ids=str)
def test_several_threads_give_the_right_gradients_in_pytorch(schedule: Schedule) -> None:
    given = arguments(Shape(), torch.float32)
    problem = Problem(
        op="hsa_backward", batch=2, seq_len=37, kv_len=101, num_heads=6, num_kv_heads=2, head_dim=24, chunk_size=16,
        top_k=3,
    )  # fmt: skip
    entry = compile_kernel(emit(problem, schedule, WITHOUT_COMPILER)).entry
    gradients = entry(given.q, given.k, given.v, given.indices, given.weights, given.grad_o, scale=24**-0.5)
    _, *expected = given.run(hsa_attention_reference, torch.float64)
    for actual, wanted in zip(gradients, expected, strict=True):
        assert relative_error(actual, wanted) <= 1e-5


def test_autocast_casts_what_it_would_for_dense_attention() -> None:
    given = arguments(Shape(), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        o = hsa_attention(given.q, given.k, given.v, given.indices, given.weights, **given.options)
        mixed = hsa_attention(given.q, given.k, given.v.bfloat16(), given.indices, given.weights, **given.options)
        with pytest.raises(InvalidArgument, match=r"k has dtype torch\.bfloat16"):
            hsa_attention(given.q.double(), given.k, given.v.double(), given.indices, given.weights, **given.options)
    lowered = (x.bfloat16() for x in (given.q, given.k, given.v))
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, hsa_attention(*lowered, given.indices, given.weights, **given.options))
    assert torch.equal(o, mixed)


@pytest.mark.parametrize(
    ("shape", "family"),
    [
        *((shape, "torch") for shape in (Shape(), ODD, OPTIONS)),
        *(pytest.param(shape, "cpp", marks=pytest.mark.exhaustive) for shape in (Shape(), ODD, OPTIONS)),
    ],
    indirect=["family"],
    ids=str,
)
def test_a_landmark_in_the_last_place_is_not_attended_to(shape: Shape, family: str) -> None:
    given = arguments(shape, torch.float32)
    results = given.run(hsa_attention, mask_last_token=True)
    assert_close(results, given.run(hsa_attention_reference, torch.float64, mask_last_token=True), torch.float32)
    landmarks = [i for i in range(shape.S) if i % shape.C == shape.C - 1]
    assert not results[2][:, landmarks].any()
    assert not results[3][:, landmarks].any()


CU_SEQLENS = torch.tensor([0, 37, 37, 120, 121, 297], dtype=torch.int32)  # one is empty, one has no whole chunk


def packed_arguments(per_head: bool) -> Arguments:
    shape = Shape(B=1, T=297, S=297, C=16, K=3, per_head=per_head)
    given = arguments(shape, torch.float32)
    lengths = CU_SEQLENS.diff()
    chunks = (lengths // shape.C).repeat_interleave(lengths).view(1, -1, 1, 1)
    indices = torch.where(given.indices < chunks, given.indices, -1)
    return replace(given, indices=indices)


@pytest.mark.parametrize(
    ("per_head", "mask_last_token", "family"),
    [
        *((per_head, mask, "torch") for per_head in (False, True) for mask in (False, True)),
        (True, True, "cpp"),
        pytest.param(False, False, "cpp", marks=pytest.mark.slow),
        pytest.param(True, False, "cpp", marks=pytest.mark.exhaustive),
        pytest.param(False, True, "cpp-own", marks=pytest.mark.exhaustive),
    ],
    indirect=["family"],
)
def test_packed_sequences_are_attended_to_one_by_one(per_head: bool, mask_last_token: bool, family: str) -> None:
    given = packed_arguments(per_head)
    options = {"cu_seqlens": CU_SEQLENS, "mask_last_token": mask_last_token}
    assert_close(
        given.run(hsa_attention, **options), given.run(hsa_attention_reference, torch.float64, **options), torch.float32
    )


@pytest.mark.parametrize("schedule", TORCH_SCHEDULES, ids=str)
def test_packed_sequences_by_each_dataflow_in_pytorch(schedule: Schedule) -> None:
    given = packed_arguments(False)
    expected, *gradients = given.run(hsa_attention_reference, torch.float64, cu_seqlens=CU_SEQLENS)
    indices, chunk_starts = global_indices(given.indices, CU_SEQLENS, 297, 16)
    problem = Problem(
        seq_len=297, num_heads=6, num_kv_heads=2, head_dim=24, chunk_size=16, top_k=3, packed=True
    )  # fmt: skip
    scale = 24**-0.5
    inputs = (given.q, given.k, given.v, indices, given.weights)
    forward = compile_kernel(emit(problem, schedule, WITHOUT_COMPILER)).entry
    backward = compile_kernel(emit(problem.with_op("hsa_backward"), schedule, WITHOUT_COMPILER)).entry
    results = [
        forward(*inputs, scale=scale, chunk_starts=chunk_starts),
        *backward(*inputs, given.grad_o, scale=scale, chunk_starts=chunk_starts),
    ]
    assert_close(results, [expected, *gradients], torch.float32)


def test_callable_from_several_threads_at_once() -> None:
    given = arguments(Shape(), torch.float32)
    expected = given.run(hsa_attention)[0]
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(given.run(hsa_attention)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results)


def test_works_in_a_forked_child_after_use_in_the_parent() -> None:
    script = """
import os, sys, torch, warnings
warnings.simplefilter("ignore")
from hsa_compile import hsa_attention
torch.set_num_threads(2)
q, k = torch.randn(2, 99, 6, 24), torch.randn(2, 101, 2, 24)
picks = torch.zeros(2, 99, 2, 3, dtype=torch.int32)
call = lambda: hsa_attention(q, k, k, picks, torch.ones(2, 99, 2, 3), chunk_size=16)
before = call()
child = os.fork()
if child == 0:
    torch.set_num_threads(2)
    os._exit(0 if torch.equal(call(), before) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
