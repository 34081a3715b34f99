"""Any valid pair of problem and schedule gives the reference's answer: drawn at random over the whole space.

It does so whatever PyTorch's default dtype is.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from corners import corners
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hsa_compile import Problem, Schedule, SearchSpace, Target, hsa_attention_reference
from hsa_compile.kernels.compare import relative_error
from hsa_compile.kernels.compile import compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.kernels.hsa_attention.op import global_indices
from hsa_compile.kernels.large_logits import too_large_for_float32
from hsa_compile.kernels.ops import OP_KERNELS, OpInputs, check, inputs_of
from hsa_compile.kernels.select_chunks.reference import select_weights_reference
from hsa_compile.paths import cxx_compiler
from hsa_compile.target import NAMED_TARGETS

OPS = ("hsa_forward", "hsa_backward")
# Looser than the table of the op's own tests: on a handful of tokens a gradient may be a difference of large numbers.
TOLERANCES = {"float32": 3e-5, "bfloat16": 3e-2, "float16": 1e-2, "float64": 1e-9}
CPU = Target.parse("cpu")
TARGETS = {
    "cpp-avx2": replace(CPU, arch="avx2"),
    "cpp-avx512": replace(CPU, arch="avx512"),
    "torch": replace(CPU, has_compiler=False),
    **{name: NAMED_TARGETS[name] for name in ("sm_80", "sm_90", "gfx942")},
}
GPUS = ("sm_80", "sm_90", "gfx942")


@dataclass(frozen=True)
class Case:
    """One problem under one schedule, as it can be written on a command line."""

    target: str
    problem: dict
    schedule: str
    lengths: tuple[int, ...]  # of packed sequences
    seed: int

    def __str__(self) -> str:
        return f"pytest tests/kernels/test_random_cases.py -k given_case --case '{json.dumps(asdict(self))}'"


@st.composite
def cases(draw: st.DrawFn, names: tuple[str, ...], most_tokens: int) -> Case:
    name = draw(st.sampled_from(names))
    gpu = name in GPUS
    packed = draw(st.booleans()) if draw(st.booleans()) else False
    lengths = tuple(draw(st.lists(st.integers(0, most_tokens), min_size=1, max_size=4))) if packed else ()
    seq_len = max(1, sum(lengths)) if packed else draw(st.integers(1, most_tokens))
    num_kv_heads = draw(st.integers(1, 2))
    per_head = draw(st.booleans())
    problem = Problem(
        op=draw(st.sampled_from(OPS)),
        batch=1 if packed else draw(st.integers(1, 2)),
        seq_len=seq_len,
        kv_len=seq_len if packed else draw(st.integers(1, 3 * most_tokens)),
        num_heads=num_kv_heads * draw(st.sampled_from((1, 2, 3, 5, 16))),
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.integers(1, 40)),
        value_dim=draw(st.integers(1, 40)),
        chunk_size=draw(st.integers(2, 40)),
        top_k=draw(st.integers(1, 5)),
        dtype=draw(st.sampled_from(("float32", "float16") if gpu else ("float32", "bfloat16", "float16", "float64"))),
        softmax_off_by_one=draw(st.booleans()),
        per_head_weights=per_head,
        mask_last_token=draw(st.booleans()),
        packed=packed,
        deterministic=draw(st.booleans()),
    )
    if per_head and problem.group == 1:  # then the two shapes of weights are one
        problem = replace(problem, per_head_weights=False)
    valid = list(SearchSpace.of(problem, TARGETS[name]).schedules())
    schedule = draw(st.sampled_from(valid))
    return Case(name, problem.to_dict(), str(schedule), lengths, draw(st.integers(0, 999)))


def run(case: Case) -> None:
    """Emits, compiles and runs a case, and compares all its results with the float64 reference."""
    problem, schedule = Problem(**case.problem), Schedule.parse(case.schedule)
    torch.manual_seed(case.seed)
    dtype = getattr(torch, problem.dtype)
    B, T, S, H, K = problem.batch, problem.seq_len, problem.kv_len, problem.num_kv_heads, problem.top_k
    q = torch.randn(B, T, problem.num_heads, problem.head_dim).to(dtype)
    k = torch.randn(B, S, H, problem.head_dim).to(dtype)
    v = torch.randn(B, S, H, problem.value_dim).to(dtype)
    grad_o = torch.randn(B, T, problem.num_heads, problem.value_dim).to(dtype)
    weights = torch.rand(B, T, problem.num_heads if problem.per_head_weights else H, K)
    weights = weights.to(torch.float64 if dtype == torch.float64 else torch.float32)
    indices, cu_seqlens, packing = _picks(problem, case.lengths)
    leaves = [x.double().requires_grad_() for x in (q, k, v, weights)]
    expected = hsa_attention_reference(
        *leaves[:3],
        indices,
        leaves[3],
        chunk_size=problem.chunk_size,
        softmax_off_by_one=problem.softmax_off_by_one,
        mask_last_token=problem.mask_last_token,
        cu_seqlens=cu_seqlens,
    )
    if problem.packed:
        indices, chunk_starts = global_indices(indices, cu_seqlens, S, problem.chunk_size)
        packing = {"chunk_starts": chunk_starts}
    entry = compile_kernel(emit(problem, schedule, TARGETS[case.target])).entry
    inputs = [q, k, v, indices, weights]
    if problem.op == "hsa_backward":
        inputs.append(grad_o)
    results = entry(*inputs, scale=problem.head_dim**-0.5, **packing)
    if problem.op == "hsa_forward":
        pairs = {"o": (results, expected.detach())}
    else:
        gradients = torch.autograd.grad(expected, leaves, grad_o.double(), materialize_grads=True)
        pairs = dict(zip(("dq", "dk", "dv", "dw"), zip(results, gradients, strict=True), strict=True))
    for name, (actual, wanted) in pairs.items():
        error = relative_error(actual, wanted)
        assert error <= TOLERANCES[problem.dtype], f"{name} is off by {error:.1e}; reproduce with: {case}"


def _picks(problem: Problem, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor | None, dict]:
    shape = (problem.batch, problem.seq_len, problem.num_kv_heads, problem.top_k)
    if not problem.packed:
        return torch.randint(-1, max(problem.num_chunks, 0), shape, dtype=torch.int32), None, {}
    lengths = lengths if sum(lengths) else (1,)
    chunks = torch.tensor([length // problem.chunk_size for length in lengths for _ in range(length)])
    indices = (torch.rand(shape) * (chunks.view(1, -1, 1, 1) + 1)).int() - 1
    return indices, torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32), {}


HOW_MANY = [12, pytest.param(150, marks=pytest.mark.exhaustive)]
ANY_SPEED = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


def draw_and_run(names: tuple[str, ...], most_tokens: int, count: int) -> None:
    settings(ANY_SPEED, max_examples=count)(given(case=cases(names, most_tokens))(run))()


@pytest.mark.slow
@pytest.mark.parametrize("count", HOW_MANY)
@pytest.mark.parametrize("arch", ["avx2", "avx512"])
def test_any_cpp_schedule_is_right(arch: str, count: int) -> None:
    if cxx_compiler() is None:
        pytest.skip("there is no C++ compiler")
    draw_and_run((f"cpp-{arch}",), 60, count // 2)


@pytest.mark.slow
@pytest.mark.parametrize("count", HOW_MANY)
def test_any_torch_schedule_is_right(count: int) -> None:
    draw_and_run(("torch",), 60, count)


@pytest.mark.slow
@pytest.mark.parametrize("count", HOW_MANY)
def test_any_triton_schedule_is_right(count: int) -> None:
    draw_and_run(GPUS, 9, count)


@pytest.fixture
def restores_the_default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("restores_the_default_dtype")
@pytest.mark.parametrize("name", ["torch", "cpp"])
@pytest.mark.parametrize("op", OP_KERNELS)
def test_the_default_dtype_changes_nothing(op: str, name: str) -> None:
    if name == "cpp" and cxx_compiler() is None:
        pytest.skip("there is no C++ compiler")
    target = CPU if name == "cpp" else TARGETS["torch"]
    # Enough tokens that bfloat16 does not count them, and that a random bfloat16 is 1 after rounding.
    sizes = {"batch": 300, "seq_len": 1, "kv_len": 2000} if op == "hsa_decode" else {"seq_len": 2000}
    problem = Problem(op=op, num_heads=2, num_kv_heads=2, head_dim=8, chunk_size=8, top_k=3, **sizes)
    kernel = compile_kernel(emit(problem, next(SearchSpace.of(problem, target).schedules()), target))

    def results(default: torch.dtype) -> list[Tensor]:
        torch.set_default_dtype(default)
        inputs = inputs_of(problem, torch.device("cpu"), distribution="trained")
        check(kernel, problem, inputs)
        found = kernel.entry(*inputs.arguments(op), **inputs.options(op))
        return [*inputs.arguments(op), *(found if isinstance(found, tuple) else (found,))]

    expected = results(torch.float32)
    for default in (torch.float64, torch.bfloat16):
        for one, wanted in zip(results(default), expected, strict=True):
            assert one is wanted is None or (one.dtype == wanted.dtype and torch.equal(one, wanted))


def _attended(tensors: list[Tensor], kv_heads: int, value: float) -> list[Tensor]:
    """q, k, v, picks, weights and grad_o where nobody picks chunk 0, and the value stands in all that is not read."""
    q, k, v, indices, weights, grad_o = tensors
    indices = torch.where(indices == 0, -1, indices)
    skipped = (indices < 0).all(3).repeat_interleave(q.shape[2] // kv_heads, 2).unsqueeze(3)  # [B, T, HQ, 1]
    q, grad_o = q.masked_fill(skipped, value), grad_o.masked_fill(skipped, value)
    k, v = k.clone(), v.clone()
    k[:, :8], v[:, :8] = value, value
    return [q, k, v, indices, weights.masked_fill(indices < 0, value), grad_o]


def _selected(tensors: list[Tensor], value: float) -> list[Tensor]:
    """query, landmarks, picks and grad_weights where nobody picks landmark 0, and the value stands as above."""
    query, landmarks, indices, grad_weights = tensors
    indices = torch.where(indices == 0, -1, indices)
    query, landmarks = query.masked_fill((indices < 0).all(3, keepdim=True), value), landmarks.clone()
    landmarks[:, 0] = value
    return [query, landmarks, indices, grad_weights.masked_fill(indices < 0, value)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["torch", "reference", pytest.param("cpp", marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", [*OPS, "select_chunks_backward"])
def test_what_no_slot_picks_reaches_no_result(op: str, name: str, value: float) -> None:
    if name == "cpp" and cxx_compiler() is None:
        pytest.skip("there is no C++ compiler")
    target = CPU if name == "cpp" else TARGETS["torch"]
    problem = Problem(op=op, seq_len=99, num_heads=2, num_kv_heads=2, head_dim=8, chunk_size=8, top_k=3)
    for fusion in ("softmax", "stick_breaking") if op == "select_chunks_backward" else ("softmax",):
        problem = replace(problem, fusion=fusion)
        inputs = inputs_of(problem, torch.device("cpu"))
        for schedule in corners(problem, target):
            run = _reference(problem) if name == "reference" else _entry(problem, schedule, target, inputs)
            found = []
            for stands in (0.0, value):
                given = [x for x in inputs.arguments(op) if x is not None]
                given = _selected(given, stands) if op == "select_chunks_backward" else _attended(
                    given if op == "hsa_backward" else [*given, given[0]], 2, stands
                )  # fmt: skip
                found.append(run(given[:5] if op == "hsa_forward" else given))
            for expected, actual in zip(*found, strict=True):
                assert relative_error(actual, expected) <= 1e-5, schedule


def test_a_landmark_in_the_last_place_reaches_no_gradient_of_the_reference() -> None:
    found = []
    for value in (0.0, float("nan")):
        leaves = [torch.randn(1, 9, 2, 8, generator=torch.Generator().manual_seed(0)) for _ in range(3)]
        for x in leaves[1:]:
            x[:, 3::4] = value
        leaves = [x.requires_grad_() for x in (*leaves, torch.ones(1, 9, 2, 1))]
        picks = torch.zeros(1, 9, 2, 1, dtype=torch.int32)
        o = hsa_attention_reference(*leaves[:3], picks, leaves[3], chunk_size=4, mask_last_token=True)
        found.append([o.detach(), *torch.autograd.grad(o.sum(), leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_logit_that_is_nan_hides_no_large_one() -> None:
    for other, large in ((1.0, False), (65.0, True), (-65.0, True), (float("nan"), True), (float("-inf"), True)):
        assert too_large_for_float32(torch.tensor([0.0, other, 1.0])) is large
    assert too_large_for_float32(torch.tensor([float("nan"), 65.0]))


def _entry(problem: Problem, schedule: Schedule, target: Target, inputs: OpInputs) -> Callable[..., tuple[Tensor, ...]]:
    entry, options = compile_kernel(emit(problem, schedule, target)).entry, inputs.options(problem.op)

    def run(tensors: list[Tensor]) -> tuple[Tensor, ...]:
        results = entry(*tensors, **options)
        return results if isinstance(results, tuple) else (results,)

    return run


def _reference(problem: Problem) -> Callable[..., tuple[Tensor, ...]]:
    def attention(tensors: list[Tensor]) -> tuple[Tensor, ...]:
        q, k, v, indices, weights, *grad_o = tensors
        leaves = [x.requires_grad_() for x in (q, k, v, weights)]
        o = hsa_attention_reference(*leaves[:3], indices, leaves[3], chunk_size=8)
        return torch.autograd.grad(o, leaves, *grad_o) if grad_o else (o.detach(),)

    def selection(tensors: list[Tensor]) -> tuple[Tensor, ...]:
        query, landmarks, indices, grad_weights = tensors
        leaves = [x.requires_grad_() for x in (query, landmarks)]
        weights = select_weights_reference(*leaves, indices, fusion=problem.fusion)
        return torch.autograd.grad(weights, leaves, grad_weights)

    return selection if problem.op == "select_chunks_backward" else attention


def test_given_case(request: pytest.FixtureRequest) -> None:
    case = request.config.getoption("--case")
    if case is None:
        pytest.skip("no --case is given")
    run(Case(**json.loads(case)))
