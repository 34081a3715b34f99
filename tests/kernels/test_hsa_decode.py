"""Decoding on this CPU against the float64 reference, and as PyTorch's tools see it."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from corners import corners
from decode_cases import CPU, SHAPES, WITHOUT_COMPILER, Case, Shape
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hsa_compile import Schedule, Target, hsa_attention_reference, hsa_decode, hsa_decode_reference
from hsa_compile.autotune.bench.bench import prepare
from hsa_compile.cli.options import expand
from hsa_compile.errors import InvalidArgument, InvalidProblem, WrongResult
from hsa_compile.kernels.compare import TOLERANCES, relative_error
from hsa_compile.kernels.hsa_decode import dispatch as decode_ops
from hsa_compile.kernels.hsa_decode import native as native_decode
from hsa_compile.kernels.hsa_decode.inputs import make_decode_inputs
from hsa_compile.kernels.worker_pool import run_on_workers
from hsa_compile.paths import cxx_compiler
from hsa_compile.problem import DECODE_OPS, DTYPES
from hsa_compile.schedules.space import SearchSpace, default_schedule
from hsa_compile.target import NAMED_TARGETS

pytestmark = pytest.mark.filterwarnings(
    "ignore::hsa_compile.errors.UntunedWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)

needs_compiler = pytest.mark.skipif(cxx_compiler() is None, reason="there is no C++ compiler")
both_families = pytest.mark.parametrize("family", ["cpp", "torch"], indirect=True)


def family_cases() -> list[Any]:
    """PyTorch in every dtype and shape, C++ in every shape and vector extension: it must be built."""
    cases: list[Any] = [(shape, "torch", dtype) for shape in SHAPES for dtype in DTYPES]
    for number, shape in enumerate(SHAPES):
        cases.append(pytest.param(shape, "cpp", "float32", marks=[pytest.mark.slow] if number in (2, 5, 8) else []))
        marks = [] if number == 1 else [pytest.mark.exhaustive]
        cases.append(pytest.param(shape, "cpp-own", "float32", marks=marks))
        marks = [pytest.mark.slow] if number == 3 else [pytest.mark.exhaustive]
        cases.append(pytest.param(shape, "cpp", "bfloat16", marks=marks))
    return cases


@pytest.mark.parametrize(("shape", "family", "dtype"), family_cases(), indirect=["family"], ids=str)
def test_output_equals_the_reference(shape: Shape, family: str, dtype: str) -> None:
    case = Case(shape, getattr(torch, dtype), torch.int64 if dtype == "float64" else torch.int32)
    tensors, table = case.tensors()
    o = hsa_decode(*tensors, page_table=table, **case.options())
    assert o.dtype == case.dtype
    assert relative_error(o, case.expected()) <= TOLERANCES[dtype]
    assert not o[0, 0, : shape.HQ // shape.H].any()


@pytest.mark.parametrize("block", [1, 4, 1024])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_every_block_of_picks_adds_up(shape: Shape, block: int) -> None:
    case = Case(shape)
    o = case.run(Schedule.of("split", block=block), WITHOUT_COMPILER)
    assert relative_error(o, case.expected()) <= TOLERANCES["float32"]


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "arch"),
    [
        pytest.param(SHAPES[4], "avx2", marks=pytest.mark.slow),
        *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in itertools.product(SHAPES, ("avx512", "avx2"))),
    ],
    ids=str,
)
def test_every_register_tile_and_split_in_cpp_adds_up(shape: Shape, arch: str) -> None:
    case, target = Case(shape), replace(CPU, arch=arch)
    for schedule in corners(case.problem(), target):
        assert relative_error(case.run(schedule, target), case.expected()) <= TOLERANCES["float32"], schedule


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
def test_tokens_are_shared_by_threads_if_they_read_enough(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counting(task: Callable[[int, int], None], count: int) -> list[tuple[int, int, None]]:
        calls.append(count)
        return run_on_workers(task, count)

    monkeypatch.setattr(native_decode, "run_on_workers", counting)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in (Shape(B=3), Shape(B=8, T=16, HQ=8, K=16)):
            case = Case(shape)
            o = case.run(Schedule.of("split", num_splits=1, rows=1))
            assert relative_error(o, case.expected()) <= TOLERANCES["float32"]
    finally:
        torch.set_num_threads(before)
    assert calls == [8 * 16 * 2]


def test_the_reference_is_that_of_attention_where_pages_are_a_sequence() -> None:
    shape = Shape(B=1, T=3, mask_last=True, per_head=True)
    (q, k, v, indices, weights), _ = Case(shape, torch.float64).tensors()
    indices = torch.where(indices < shape.P, indices, -1)
    indices[:, 0], q[:, 0] = -1, float("nan")
    flat = [x.transpose(1, 2).reshape(1, -1, shape.H, x.shape[3]) for x in (k, v)]
    options: dict[str, Any] = {"chunk_size": shape.C, "mask_last_token": True}
    expected = hsa_attention_reference(q, *flat, indices, weights, **options)
    actual = hsa_decode_reference(q, k, v, indices, weights, mask_last_token=True)
    torch.testing.assert_close(actual, expected)
    assert actual.isfinite().all()
    assert not actual[:, 0].any()


@both_families
def test_large_logits_stay_right(family: str) -> None:
    (q, k, v, indices, weights), table = Case(Shape(N=7)).tensors()
    q = q * 1e3
    clean = [x.double().nan_to_num(0.0) for x in (k, v)]
    expected = hsa_decode_reference(q.double(), *clean, indices, weights, page_table=table)
    assert relative_error(hsa_decode(q, k, v, indices, weights, page_table=table), expected) <= 1e-4


@pytest.mark.parametrize("scale", [0.7, -0.7])
def test_a_scale_of_ones_own_is_used(scale: float, scales_in_kernels: list[float]) -> None:
    (q, k, v, indices, weights), table = Case(Shape(N=7)).tensors()
    clean = [x.double().nan_to_num(0.0) for x in (k, v)]
    expected = hsa_decode_reference(q.double(), *clean, indices, weights, page_table=table, scale=scale)
    assert relative_error(hsa_decode(q, k, v, indices, weights, page_table=table, scale=scale), expected) <= 1e-4
    assert scales_in_kernels == [0.7]  # a kernel takes no negative one


@both_families
def test_interleaved_and_stacked_pools_are_read_where_they_lie(family: str) -> None:
    case = Case(Shape())
    (q, k, v, indices, weights), _ = case.tensors()
    pool = torch.stack([k, v], dim=1)  # [P, 2, H, C, D]
    o = hsa_decode(q, pool[:, 0], pool[:, 1], indices, weights)
    assert torch.equal(o, hsa_decode(q, k, v, indices, weights))


def test_inputs_that_are_not_contiguous_are_taken() -> None:
    (q, k, v, indices, weights), table = Case(Shape(T=3, N=7)).tensors()
    mixed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, indices, weights)]
    assert table is not None
    o = hsa_decode(mixed[0], k, v, *mixed[1:], page_table=table.T.contiguous().T)
    assert torch.equal(o, hsa_decode(q, k, v, indices, weights, page_table=table))


@pytest.mark.parametrize("shape", [Shape(T=0), Shape(B=0), Shape(K=0), Shape(P=0, N=0)], ids=["T0", "B0", "K0", "P0"])
def test_nothing_to_attend_to_gives_zeros(shape: Shape) -> None:
    q = torch.randn(shape.B, shape.T, shape.HQ, shape.D)
    k, v = torch.randn(2, shape.P, shape.H, shape.C, shape.D)
    picks = torch.full((shape.B, shape.T, shape.H, shape.K), -1)
    o = hsa_decode(q, k, v, picks, torch.ones(picks.shape))
    assert o.shape == q.shape
    assert not o.any()


@both_families
def test_all_slots_empty_gives_zeros(family: str) -> None:
    (q, k, v, indices, weights), _ = Case(Shape()).tensors()
    assert not hsa_decode(q, k, v, torch.full_like(indices, -1), weights).any()
    table = torch.full((2, 0), -1)
    assert not hsa_decode(q, k, v, indices, weights, page_table=table).any()


def wrong_arguments() -> dict[str, tuple[dict[str, Any], str]]:
    (q, k, v, indices, weights), table = Case(Shape(N=7)).tensors()
    assert table is not None
    return {
        "no tensor": ({"k_chunks": [1]}, "k_chunks is a list"),
        "dimensions": ({"q": q[0]}, "q has shape .* four dimensions"),
        "tokens": ({"q": q.expand(-1, 17, -1, -1)}, "T = 17 .* at most 16"),
        "pool": ({"v_chunks": v[:-1]}, r"v_chunks has shape .* \[P, H, C, Dv\]"),
        "width": ({"k_chunks": k[..., :-1]}, r"k_chunks has shape .* \[P, H, C, D\]"),
        "heads": ({"q": q[:, :, :5]}, "q has 5 heads"),
        "landmark": ({"k_chunks": k[:, :, :1], "v_chunks": v[:, :, :1], "mask_last_token": True}, "C = 1 keys"),
        "picks": ({"chunk_indices": indices[..., :2]}, "chunk_weights has shape"),
        "pick dtype": ({"chunk_indices": indices.float()}, "chunk_indices has dtype torch.float32"),
        "weight dtype": ({"chunk_weights": weights.int()}, "chunk_weights has dtype torch.int32"),
        "dtypes": ({"k_chunks": k.half()}, "k_chunks has dtype torch.float16"),
        "scale": ({"scale": float("inf")}, "scale = inf"),
        "huge scale": ({"scale": 10**400}, "scale = an integer of more than 200 digits"),
        "off by one": ({"softmax_off_by_one": 1}, "softmax_off_by_one = 1 must be True or False"),
        "mask": ({"mask_last_token": None}, "mask_last_token = None must be True or False"),
        "table": ({"page_table": table[:1]}, r"page_table has shape \[1, 7\]; \[B, N\] = \[2, N\]"),
        "table dtype": ({"page_table": table.float()}, "page_table has dtype torch.float32"),
        "no table": ({"page_table": [0]}, "page_table is a list"),
        "device": ({"chunk_indices": indices.to("meta")}, "chunk_indices is on meta"),
        "table device": ({"page_table": table.to("meta")}, "page_table is on meta"),
        "a page in pieces": ({"k_chunks": k.transpose(1, 2).contiguous().transpose(1, 2)}, "must be contiguous"),
    }


@pytest.mark.parametrize("name", wrong_arguments())
def test_a_wrong_argument_is_named_with_what_is_allowed(name: str) -> None:
    (q, k, v, indices, weights), table = Case(Shape(N=7)).tensors()
    given = {"q": q, "k_chunks": k, "v_chunks": v, "chunk_indices": indices, "chunk_weights": weights}
    wrong, message = wrong_arguments()[name]
    with pytest.raises(InvalidArgument, match=message):
        hsa_decode(**{**given, "page_table": table, **wrong})


def test_a_gradient_is_refused_and_not_zero() -> None:
    (q, k, v, indices, weights), _ = Case(Shape()).tensors()
    o = hsa_decode(q.requires_grad_(), k, v, indices, weights)
    with pytest.raises(InvalidArgument, match="hsa_decode has no gradient; use hsa_attention"):
        o.sum().backward()
    with torch.no_grad():
        assert not hsa_decode(q, k, v, indices, weights).requires_grad


def test_a_pool_in_pageable_memory_is_refused_for_a_query_on_a_gpu() -> None:
    k = torch.zeros(3, 2, 4, 8)
    with pytest.raises(InvalidArgument, match="pin it"):
        decode_ops._check_pinned("k_chunks", k, torch.device("cuda"))


@pytest.mark.parametrize("shape", [Shape(), Shape(T=3, N=7, per_head=True)], ids=str)
def test_opcheck(shape: Shape) -> None:
    tensors, table = Case(shape).tensors()
    tensors = [x.nan_to_num(0.0) if x.is_floating_point() else x for x in tensors]
    torch.library.opcheck(decode_ops.hsa_decode, (*tensors, table, 0.25, False, False))


def test_compiles_whole_for_any_batch() -> None:
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, examples: list[Tensor]):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    def decode(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor, table: Tensor) -> Tensor:
        return hsa_decode(q, k, v, indices, weights, page_table=table).relu()

    compiled = torch.compile(decode, backend=count, fullgraph=True, dynamic=True)
    for batch in (4, 9, 13):  # no size of anything else
        tensors, table = Case(Shape(B=batch, T=3, N=7)).tensors()
        assert torch.equal(compiled(*tensors, table), decode(*tensors, table))
    assert len(graphs) == 1


def test_the_shape_is_known_without_data() -> None:
    tensors, _ = Case(Shape(Dv=40)).tensors()
    assert hsa_decode(*(x.to("meta") for x in tensors)).shape == (2, 1, 6, 40)


def test_pages_may_lie_in_host_memory_for_a_query_on_a_gpu() -> None:
    with FakeTensorMode():
        q, weights = torch.empty(2, 1, 6, 24, device="cuda"), torch.empty(2, 1, 2, 5, device="cuda")
        k, v = torch.empty(2, 11, 2, 16, 24)
        picks = torch.empty(2, 1, 2, 5, dtype=torch.int32)
        o = hsa_decode(q, k, v, torch.empty_like(picks, device="cuda"), weights)
        assert (o.shape, o.device.type) == ((2, 1, 6, 24), "cuda")
        with pytest.raises(InvalidArgument, match="chunk_indices is on cpu"):
            hsa_decode(q, k, v, picks, weights)


def test_autocast_casts_nothing() -> None:
    tensors, table = Case(Shape(N=7)).tensors()
    with torch.autocast("cpu", torch.bfloat16):
        o = hsa_decode(*tensors, page_table=table)
    assert torch.equal(o, hsa_decode(*tensors, page_table=table))


def test_a_problem_of_many_tokens_is_none() -> None:
    with pytest.raises(InvalidProblem, match="seq_len = 17"):
        replace(Case(Shape()).problem(), seq_len=17)


@pytest.mark.parametrize("name", NAMED_TARGETS)
@pytest.mark.parametrize("top_k", [1, 3, 16, 100])
@pytest.mark.parametrize("batch", [1, 64])
def test_the_default_fills_the_device_if_the_slots_suffice(name: str, top_k: int, batch: int) -> None:
    target = NAMED_TARGETS[name]
    problem = replace(expand(target, {}, DECODE_OPS)[0], top_k=top_k, batch=batch)
    split = default_schedule(problem, target).number("num_splits")
    assert split in (1, 2, 4, 8, 16)
    assert split / 2 < top_k
    tokens = batch * problem.num_kv_heads
    assert tokens * split >= target.num_cores or split == 16 or split >= top_k
    assert split == 1 or tokens * split // 2 < target.num_cores


@pytest.mark.parametrize("name", ["cpu", "cpu without a compiler", *NAMED_TARGETS])
@pytest.mark.parametrize("group", [1, 3, 64])
@pytest.mark.parametrize("top_k", [1, 5, 16])
def test_schedules_are_valid_and_fit_fewer_slots(name: str, group: int, top_k: int) -> None:
    target = {"cpu": CPU, "cpu without a compiler": WITHOUT_COMPILER, **NAMED_TARGETS}[name]
    problem = replace(Case(Shape(HQ=group, H=1, D=128, Dv=128, C=64)).problem(), top_k=top_k)
    space = SearchSpace.of(problem, target)
    listed = list(space.schedules())
    assert default_schedule(problem, target) in listed
    fewer = SearchSpace.of(replace(problem, top_k=1), target)
    assert all(fewer.is_valid(fewer.fit(schedule)) for schedule in listed)


def test_float64_is_refused_on_a_gpu_and_a_huge_gather_on_a_cpu() -> None:
    sm_90 = NAMED_TARGETS["sm_90"]
    problem = replace(Case(Shape(), torch.float64).problem(), head_dim=256, value_dim=256, chunk_size=1024)
    schedule = Schedule.of("split", num_splits=1, num_warps=4, num_stages=1)
    assert "float64" in (SearchSpace.of(problem, sm_90).why_invalid(schedule) or "")
    reason = SearchSpace.of(problem, CPU).why_invalid(Schedule.of("split", block=1024))
    assert "block = 1024 gathers" in (reason or "")


@pytest.mark.parametrize(
    ("target", "schedule"),
    [
        (WITHOUT_COMPILER, Schedule.of("split", block=4)),
        pytest.param(CPU, Schedule.of("split", num_splits=2, rows=1), marks=needs_compiler),
    ],
    ids=["torch", "cpp"],
)
@pytest.mark.parametrize("paged", [False, True], ids=["pages", "table"])
def test_a_candidate_of_the_tuner_is_checked(
    paged: bool, target: Target, schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = replace(Case(Shape(N=7)).problem(), paged=paged, batch=3)
    inputs = make_decode_inputs(problem, torch.device("cpu"))
    candidate = prepare(problem, schedule, target, inputs)
    o = candidate.call()
    assert isinstance(o, Tensor)
    options = inputs.options("hsa_decode")
    expected = hsa_decode_reference(*inputs.arguments("hsa_decode"), **options)  # type: ignore[arg-type]
    torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-5)

    module = prepare.__globals__
    real = module["compile_kernel"]

    def spoiled(source: Any) -> Any:
        kernel = real(source)
        return replace(kernel, entry=lambda *args, **kwargs: kernel.entry(*args, **kwargs) * 1.01)

    monkeypatch.setitem(module, "compile_kernel", spoiled)
    with pytest.raises(WrongResult, match="o is off by"):
        prepare(problem, schedule, target, inputs)


def test_the_default_problem_is_one_token_of_a_paged_sequence() -> None:
    (problem,) = expand(CPU, {"seq_len": [8192]}, DECODE_OPS)
    assert (problem.seq_len, problem.kv_len, problem.paged) == (1, 8192, True)
