"""Chunk selection against the float64 reference on this CPU: picks, weights and both gradients."""

import zlib
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from corners import corners
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hsa_compile import Problem, Target, select_chunks, select_chunks_reference
from hsa_compile.errors import InvalidArgument
from hsa_compile.kernels.compare import TOLERANCES, relative_error
from hsa_compile.kernels.compile import compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.kernels.gumbel import gumbel, noise_keys
from hsa_compile.kernels.select_chunks.reference import select_weights_reference
from hsa_compile.paths import cxx_compiler
from hsa_compile.target import this_cpu

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")

CPU = Target.parse("cpu")
FUSIONS = ("softmax", "stick_breaking")


@dataclass(frozen=True)
class Shape:
    B: int = 2
    T: int = 37
    N: int = 13
    H: int = 3
    D: int = 24
    C: int = 3
    K: int = 4
    offset: int = 0
    fusion: str = "softmax"
    seed: int | None = None
    R: int = 1

    def __str__(self) -> str:
        text = f"B{self.B}-T{self.T}-N{self.N}-H{self.H}-D{self.D}-C{self.C}-K{self.K}"
        text += f"-R{self.R}" * (self.R > 1)
        return f"{text}-at{self.offset}-{self.fusion}" + "-noise" * (self.seed is not None)

    def options(self) -> dict[str, Any]:
        return {
            "chunk_size": self.C, "top_k": self.K, "offset": self.offset, "fusion": self.fusion,
            "noise_seed": self.seed,
        }  # fmt: skip

    def problem(self, **more: Any) -> Problem:
        return Problem(
            **{
                "op": "select_chunks", "batch": self.B, "seq_len": self.T, "kv_len": self.N * self.C,
                "num_heads": self.H, "num_kv_heads": self.H, "head_dim": self.D, "chunk_size": self.C, "top_k": self.K,
                "landmarks_per_chunk": self.R, "fusion": self.fusion, "noise": self.seed is not None, **more,
            }
        )  # fmt: skip


SHAPES = [
    Shape(),
    Shape(fusion="stick_breaking", seed=7),
    Shape(T=3, N=5, K=9, offset=40, fusion="stick_breaking"),  # K > N
    Shape(T=50, N=600, D=5, C=2, K=128, H=1, offset=900, seed=2**64 - 1),
    Shape(B=1, T=1, N=300, H=1, D=64, C=2, K=8, offset=700),
    Shape(T=200, N=150, D=20, C=1, K=33, H=1, fusion="stick_breaking"),
    Shape(B=1, T=33, N=9, D=300, C=4, K=1, seed=0),
    Shape(T=70, N=3, C=64, K=2, D=8, offset=2**33 - 10),
    Shape(T=61, N=29, R=2, K=5, fusion="stick_breaking"),
    Shape(T=90, N=150, R=8, C=1, K=20, D=40, seed=4),
    Shape(B=1, T=5, N=3, R=16, K=9, offset=7),
]


def whole_numbers(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Query and landmarks whose products are exact in float32, so that equal scores are equal everywhere."""
    random = torch.Generator().manual_seed(zlib.crc32(str(shape).encode()))
    query = torch.randint(-2, 3, (shape.B, shape.T, shape.H, shape.D), generator=random)
    landmarks = torch.randint(-2, 3, (shape.B, shape.N, shape.R, shape.H, shape.D), generator=random)
    landmarks = landmarks if shape.R > 1 else landmarks.squeeze(2)
    return query.to(dtype), landmarks.to(dtype)


def normal(shape: Shape, dtype: torch.dtype = torch.float32, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(zlib.crc32(str(shape).encode()))
    query = torch.randn(shape.B, shape.T, shape.H, shape.D, generator=random) * factor
    return query.to(dtype), torch.randn(shape.B, shape.N, shape.H, shape.D, generator=random).to(dtype)


both_families = pytest.mark.parametrize("family", ["cpp", "torch"], indirect=True)


def family_cases() -> list[Any]:
    """PyTorch in every shape, C++ for its own vector extension in one and for AVX2 in the others: it must be built."""
    slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive
    cases: list[Any] = [(shape, "torch") for shape in SHAPES]
    for number, shape in enumerate(SHAPES):
        cases.append(pytest.param(shape, "cpp-own", marks=[] if number == 0 else [exhaustive]))
        marks = [] if number in (1, 2, 8) else [slow] if number in (0, 3, 9) else [exhaustive]
        cases.append(pytest.param(shape, "cpp", marks=marks))
    return cases


@pytest.mark.parametrize(("shape", "family"), family_cases(), indirect=["family"], ids=str)
def test_picks_weights_and_gradients_equal_the_reference(shape: Shape, family: str) -> None:
    leaves = [x.requires_grad_() for x in whole_numbers(shape)]
    precise = [x.detach().double().requires_grad_() for x in leaves]
    indices, weights = select_chunks(*leaves, **shape.options())
    expected_indices, expected_weights = select_chunks_reference(*precise, **shape.options())
    assert (indices.dtype, weights.dtype) == (torch.int32, torch.float32)
    assert torch.equal(indices, expected_indices)
    assert relative_error(weights.detach(), expected_weights.detach()) <= 1e-5
    assert not weights[indices < 0].any()
    grad = torch.randn(weights.shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad(weights, leaves, grad)
    for one, other in zip(gradients, torch.autograd.grad(expected_weights, precise, grad.double()), strict=True):
        assert relative_error(one, other) <= 1e-5


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        pytest.param("cpp", torch.bfloat16, marks=pytest.mark.slow),
        *(("torch", dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)),
    ],
    indirect=["family"],
    ids=str,
)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_other_dtypes_keep_the_weights_in_full_precision(family: str, dtype: torch.dtype, fusion: str) -> None:
    shape = Shape(fusion=fusion, T=61, D=40)
    leaves = [x.requires_grad_() for x in normal(shape, dtype)]
    precise = [x.detach().double().requires_grad_() for x in leaves]
    indices, weights = select_chunks(*leaves, **shape.options())
    expected = select_weights_reference(*precise, indices, fusion=fusion)
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(indices, select_chunks_reference(*precise, **shape.options())[0])
    assert relative_error(weights.detach(), expected.detach()) <= (1e-10 if dtype == torch.float64 else 1e-5)
    gradients = torch.autograd.grad(weights.sin().sum(), leaves)
    for one, other in zip(gradients, torch.autograd.grad(expected.sin().sum(), precise), strict=True):
        assert one.dtype == dtype
        assert relative_error(one, other) <= TOLERANCES[str(dtype).removeprefix("torch.")]


@both_families
@pytest.mark.parametrize("fusion", FUSIONS)
def test_scores_of_ten_thousand_stay_finite_and_right(family: str, fusion: str) -> None:
    shape = Shape(fusion=fusion, T=61)
    leaves = [x.requires_grad_() for x in normal(shape, factor=1e4)]
    precise = [x.detach().double().requires_grad_() for x in leaves]
    indices, weights = select_chunks(*leaves, **shape.options())
    expected = select_weights_reference(*precise, indices, fusion=fusion).detach()
    assert relative_error(weights.detach(), expected) <= 1e-5
    for one in torch.autograd.grad(weights.sin().sum(), leaves):
        assert one.isfinite().all()


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("offset", [0, 5])
def test_gradcheck(fusion: str, offset: int) -> None:
    shape = Shape(B=1, T=7, N=4, H=2, D=3, C=2, K=2)
    leaves = [x.requires_grad_() for x in normal(shape, torch.float64)]
    assert torch.autograd.gradcheck(
        lambda *x: select_chunks(*x, chunk_size=2, top_k=2, offset=offset, fusion=fusion)[1], leaves
    )


def test_the_reference_on_paper() -> None:
    """Scores 3, 1, 2 of chunks 0, 1, 2, seen by rows at the positions 1 … 6 in chunks of two."""
    query = torch.ones(1, 6, 1, 1, dtype=torch.float64)
    landmarks = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64).view(1, 3, 1, 1)
    for op in (select_chunks, select_chunks_reference):
        indices, weights = op(query, landmarks, chunk_size=2, top_k=2, offset=1, fusion="stick_breaking")
        assert indices.flatten(1).tolist() == [[-1, -1, 0, -1, 0, -1, 1, 0, 1, 0, 2, 0]]
        s = torch.sigmoid(landmarks.flatten())
        expected = [0, 0, s[0], 0, s[0], 0, s[1], (1 - s[1]) * s[0], s[1], (1 - s[1]) * s[0], s[2], (1 - s[2]) * s[0]]
        torch.testing.assert_close(weights.flatten(), torch.tensor(expected, dtype=torch.float64))


def test_a_chunk_scores_as_the_best_of_its_landmarks_on_paper() -> None:
    """Scores (3, 1), (0, 2), (2, 2) of chunks 0, 1, 2; the gradient reaches the first landmark that is the best."""
    query = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for op in (select_chunks, select_chunks_reference):
        landmarks = torch.tensor([3.0, 1, 0, 2, 2, 2], dtype=torch.float64).view(1, 3, 2, 1, 1).requires_grad_()
        indices, weights = op(query, landmarks, chunk_size=2, top_k=2, offset=6)
        assert indices.flatten().tolist() == [1, 0]
        torch.testing.assert_close(weights.flatten(), torch.tensor([2.0, 3.0], dtype=torch.float64).softmax(0))
        indices, weights = op(query, landmarks[:, 1:], chunk_size=2, top_k=1, offset=6)
        assert indices.flatten().tolist() == [0]
        indices, weights = op(query, landmarks[:, 1:], chunk_size=2, top_k=2, offset=6)
        (grad,) = torch.autograd.grad(weights[..., 0].sum(), landmarks)
        torch.testing.assert_close(grad.flatten(), torch.tensor([0, 0, 0, -0.25, 0.25, 0], dtype=torch.float64))


@both_families
def test_of_equal_scores_the_lower_chunks_win(family: str) -> None:
    indices, weights = select_chunks(torch.zeros(1, 99, 2, 24), torch.ones(1, 33, 2, 24), chunk_size=3, top_k=3)
    assert (indices[0, 9:] == torch.tensor([2, 1, 0])).all()
    torch.testing.assert_close(weights[0, 9:], torch.full((90, 2, 3), 1 / 3))
    signed = torch.tensor([0.0, -0.0, 0.0, -0.0]).view(1, 4, 1, 1).expand(1, 4, 1, 24)
    assert select_chunks(-torch.ones(1, 1, 1, 24), signed, chunk_size=3, top_k=2, offset=19)[0].tolist() == [[[[1, 0]]]]


@both_families
@pytest.mark.parametrize("shape", [*SHAPES[:2], SHAPES[8]], ids=str)
@pytest.mark.parametrize("broken", ["a query", "one landmark", "most landmarks"])
def test_nan_is_picked_first_and_makes_weights_of_nan(broken: str, shape: Shape, family: str) -> None:
    query, landmarks = whole_numbers(shape)
    x = query[:, 30] if broken == "a query" else landmarks[:, 1 if broken == "one landmark" else slice(1, 9)]
    x.fill_(float("nan"))
    indices, weights = select_chunks(query, landmarks, **shape.options())
    expected_indices, expected = select_chunks_reference(query.double(), landmarks.double(), **shape.options())
    assert weights[0, 30, 0].isnan().any()
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(weights, expected.float(), equal_nan=True)


@both_families
@pytest.mark.parametrize("seed", [None, 3])
def test_a_sequence_in_pieces_gives_the_same_picks(family: str, seed: int | None) -> None:
    shape = Shape(T=90, N=30, seed=seed)
    query, landmarks = whole_numbers(shape)
    whole = select_chunks(query, landmarks, **shape.options())
    pieces = [
        select_chunks(query[:, start:stop], landmarks, **{**shape.options(), "offset": start})
        for start, stop in ((0, 1), (1, 50), (50, 89), (89, 90))
    ]
    for one, parts in zip(whole, zip(*pieces, strict=True), strict=True):
        assert torch.equal(one, torch.cat(parts, dim=1))


TARGETS = {
    "torch": replace(CPU, has_compiler=False),
    "cpp": CPU,
    "avx2": replace(CPU, arch="avx2"),
    "scalar": replace(CPU, arch="scalar"),
}


@pytest.mark.parametrize(
    "name",
    [
        "torch",
        pytest.param("avx2", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("cpp", "scalar")),
    ],
)
def test_every_schedule_gives_the_same_picks(name: str) -> None:
    seed, target = 5, TARGETS[name]
    if name != "torch" and cxx_compiler() is None:
        pytest.skip("there is no C++ compiler")
    shapes = (
        Shape(T=301, N=150, C=2, K=20, seed=seed),
        Shape(T=70, N=70, C=2, K=3, offset=99, seed=seed),
        Shape(T=70, N=70, R=4, C=2, K=3, offset=99, seed=seed),
    )
    for shape in shapes:
        query, landmarks = whole_numbers(shape)
        landmarks = landmarks.view(shape.B, -1, shape.H, shape.D)
        for schedule in corners(shape.problem(), target):
            entry = compile_kernel(emit(shape.problem(), schedule, target)).entry
            keys = noise_keys(seed, shape.B, shape.H, torch.arange(shape.T) + shape.offset)
            picks, weights = entry(query, landmarks, keys, top_k=shape.K, offset=shape.offset)
            of_chunks = landmarks.double().unflatten(1, (shape.N, shape.R))
            expected = select_chunks_reference(query.double(), of_chunks, **shape.options())
            assert torch.equal(picks.div(shape.R, rounding_mode="floor").int(), expected[0])
            assert relative_error(weights, expected[1]) <= 1e-5


def test_noise_depends_on_seed_batch_head_position_and_chunk_alone() -> None:
    positions, chunks = torch.arange(40), torch.arange(50)
    noise = gumbel(noise_keys(3, 2, 3, positions).unsqueeze(-1), chunks)
    assert noise.flatten().unique().numel() > 0.99 * noise.numel()
    assert torch.equal(noise[:1, 7:9, :2, 5:], gumbel(noise_keys(3, 1, 2, positions[7:9]).unsqueeze(-1), chunks[5:]))
    assert not torch.equal(noise, gumbel(noise_keys(4, 2, 3, positions).unsqueeze(-1), chunks))
    assert not torch.equal(noise_keys(3, 2, 3, positions), noise_keys(3 + 2**32, 2, 3, positions))


def test_noise_is_standard_gumbel_and_never_changes() -> None:
    noise = gumbel(noise_keys(0, 1, 1, torch.arange(1000)).unsqueeze(-1), torch.arange(1000)).double()
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.005)
    assert float(noise.var()) == pytest.approx(1.6449, abs=0.02)
    assert noise_keys(12345678901234, 1, 2, torch.tensor([2**33])).flatten().tolist() == [827026357, 435447478]


@pytest.mark.parametrize("family", ["cpp"], indirect=True)
def test_noise_changes_picks_but_not_the_weights_of_picks(family: str) -> None:
    shape = Shape(T=200, N=60, seed=1)
    query, landmarks = whole_numbers(shape)
    indices, weights = select_chunks(query, landmarks, **shape.options())
    assert not torch.equal(indices, select_chunks(query, landmarks, chunk_size=shape.C, top_k=shape.K)[0])
    expected = select_weights_reference(query.double(), landmarks.double(), indices, fusion="softmax")
    assert relative_error(weights, expected) <= 1e-5


@pytest.mark.parametrize("empty", ["no chunks", "no tokens", "none visible"])
def test_nothing_to_select_gives_empty_slots_that_have_gradients(empty: str) -> None:
    query = torch.randn(2, 0 if empty == "no tokens" else 2, 3, 24, requires_grad=True)
    landmarks = torch.randn(2, 0 if empty == "no chunks" else 4, 3, 24, requires_grad=True)
    indices, weights = select_chunks(query, landmarks, chunk_size=3, top_k=2)
    assert indices.shape == weights.shape == (2, query.shape[1], 3, 2)
    assert (indices == -1).all()
    assert not weights.any()
    for gradient in torch.autograd.grad(weights.sum(), (query, landmarks)):
        assert not gradient.any()


def test_strided_inputs_and_one_gradient_alone_are_fine() -> None:
    shape = Shape()
    query, landmarks = whole_numbers(shape)
    expected = select_chunks(query, landmarks, **shape.options())
    strided = (query.transpose(1, 2).contiguous().transpose(1, 2), landmarks.repeat(1, 1, 1, 2)[..., : shape.D])
    for one, other in zip(select_chunks(*strided, **shape.options()), expected, strict=True):
        assert torch.equal(one, other)
    query.requires_grad_()
    select_chunks(query, landmarks, **shape.options())[1].sin().sum().backward()
    assert query.grad is not None


@both_families
def test_several_threads_give_what_one_does_and_the_same_bits_twice(family: str) -> None:
    shape = Shape(T=2500, N=300, C=5)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (3, 3, 1):
            torch.set_num_threads(threads)
            leaves = [x.requires_grad_() for x in normal(shape)]
            weights = select_chunks(*leaves, **shape.options(), deterministic=True)[1]
            results.append([weights.detach(), *torch.autograd.grad(weights.sin().sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    for one, again, alone in zip(*results, strict=True):
        assert torch.equal(one, again)
        assert relative_error(one, alone) <= 1e-5


class LargestTensor(TorchDispatchMode):
    """Remembers the most bytes that any operator's result had."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.nbytes = max(self.nbytes, *sizes, 0)
        return result


@both_families
def test_no_tensor_has_tokens_times_chunks_elements(family: str) -> None:
    T, N = 8192, 2048
    leaves = [torch.randn(1, n, 1, 24, requires_grad=True) for n in (T, N)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # then all operators run on this thread, where the mode sees them
    this_cpu.cache_clear()
    try:
        with LargestTensor() as largest:
            weights = select_chunks(*leaves, chunk_size=3, top_k=4, noise_seed=1)[1]
            torch.autograd.grad(weights.sum(), leaves)
    finally:
        torch.set_num_threads(threads)
    assert T * 24 <= largest.nbytes <= T * N * 4 / 16


QUERY, LANDMARKS = torch.zeros(1, 4, 2, 8), torch.zeros(1, 3, 2, 8)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"query": [1]}, "query is a list"),
        ({"query": torch.zeros(4, 2, 8)}, r"query has shape \[4, 2, 8\]; four dimensions"),
        ({"query": QUERY.int()}, "query has dtype torch.int32; .* float32"),
        ({"landmarks": LANDMARKS.half()}, "landmarks has dtype torch.float16; both tensors must share"),
        ({"landmarks": torch.zeros(1, 3, 1, 8)}, r"landmarks has shape \[1, 3, 1, 8\]; .* \[1, 3, 2, 8\]"),
        ({"landmarks": torch.zeros(1, 3, 3, 2, 8)}, r"landmarks.shape\[2\] = 3 is not one of 1, 2, 4, 8, 16"),
        ({"landmarks": torch.zeros(1, 3, 2, 1, 8)}, r"landmarks has shape \[1, 6, 1, 8\]; .* \[1, 6, 2, 8\]"),
        ({"landmarks": LANDMARKS.to("meta")}, "landmarks is on meta, query on cpu"),
        ({"query": torch.zeros(1, 4, 2, 1025), "landmarks": torch.zeros(1, 3, 2, 1025)}, "Dr = 1025 .* 1 … 1024"),
        ({"chunk_size": 0}, "chunk_size = 0 must be an integer in 1 …"),
        ({"top_k": 129}, "top_k = 129 must be an integer in 1 … 128"),
        ({"top_k": 2.0}, "top_k = 2.0 must be"),
        ({"offset": -1}, "offset = -1 must be"),
        ({"noise_seed": True}, "noise_seed = True must be .*, or None"),
        ({"fusion": "mean"}, "fusion = 'mean' is not one of softmax, stick_breaking"),
    ],
)
def test_bad_arguments_name_the_value_and_what_is_allowed(bad: dict[str, Any], message: str) -> None:
    good = {"query": QUERY, "landmarks": LANDMARKS, "chunk_size": 1, "top_k": 2}
    with pytest.raises(InvalidArgument, match=message) as caught:
        select_chunks(**{**good, **bad})
    assert "\n" not in str(caught.value)
