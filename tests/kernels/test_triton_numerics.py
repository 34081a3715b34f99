"""The emitted Triton kernels, interpreted on this CPU, against the float64 reference: outputs and all gradients."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from hsa_compile.autotune.check import TOLERANCES, relative_error
from hsa_compile.kernels.compile import compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.kernels.inverse_index import inverse_index, list_addresses, split_lists
from hsa_compile.kernels.reference import hsa_attention_reference
from hsa_compile.problem import Problem, next_power_of_2
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import Target

tl = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("triton.runtime.interpreter")

TARGET = Target.parse("sm_90")
DATAFLOWS = ("token", "chunk")
ROWS = 32  # of a chunk-stationary step: small, so that short lists take several


@dataclass(frozen=True)
class Shape:
    B: int = 1
    T: int = 7
    S: int = 75
    HQ: int = 6
    H: int = 2
    D: int = 24
    Dv: int = 24
    C: int = 16
    K: int = 3
    off_by_one: bool = False
    per_head: bool = False
    logits: float = 1.0
    index_dtype: torch.dtype = torch.int32

    def __str__(self) -> str:
        text = f"B{self.B}-T{self.T}-S{self.S}-HQ{self.HQ}-H{self.H}-D{self.D}-Dv{self.Dv}-C{self.C}-K{self.K}"
        return text + "-off_by_one" * self.off_by_one + "-per_head" * self.per_head + f"-x{self.logits:g}"


SHAPES = [
    Shape(),
    Shape(B=2, HQ=2, T=5),  # G = 1
    Shape(HQ=32, T=5, K=2, D=16, Dv=16, index_dtype=torch.int64),  # G = 16
    Shape(D=20, Dv=40, C=19),
    Shape(T=1, S=517, K=8),
    Shape(T=1, S=16, HQ=1, H=1, K=1),
    Shape(T=11, S=33, HQ=4, H=1, K=7),  # K beyond the chunks: duplicates and many empty slots
    Shape(off_by_one=True),
    Shape(per_head=True, HQ=3, H=1),
    Shape(off_by_one=True, per_head=True, B=2, T=3),
]


@dataclass(frozen=True)
class Case:
    """Random tensors of a shape; row 0 has only empty slots, and an empty slot may be any index out of range."""

    shape: Shape
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def tensors(self) -> list[Tensor]:
        """q, k, v, chunk_indices, chunk_weights, grad_o."""
        shape, random = self.shape, torch.Generator().manual_seed(self.seed)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=random).to(self.dtype)

        num_chunks = shape.S // shape.C
        size = (shape.B, shape.T, shape.H, shape.K)
        indices = torch.randint(-2, num_chunks + 1, size, generator=random)
        indices[:, : shape.T // 2 : 3] = -1
        indices[indices == num_chunks] = 2**31 - 1
        heads = shape.HQ if shape.per_head else shape.H
        weights = torch.rand(shape.B, shape.T, heads, shape.K, generator=random)
        empty = (indices < 0) | (indices >= num_chunks)
        weights[empty.repeat_interleave(heads // shape.H, dim=2)] = float("nan")  # must not be read
        return [
            normal(shape.B, shape.T, shape.HQ, shape.D) * shape.logits,
            normal(shape.B, shape.S, shape.H, shape.D),
            normal(shape.B, shape.S, shape.H, shape.Dv),
            indices.to(shape.index_dtype),
            weights,
            normal(shape.B, shape.T, shape.HQ, shape.Dv),
        ]

    def expected(self) -> list[Tensor]:
        """o, dq, dk, dv, dw in float64."""
        q, k, v, indices, weights, grad_o = self.tensors()
        indices = torch.where(indices < self.shape.S // self.shape.C, indices, -1)
        leaves = [x.double().requires_grad_() for x in (q, k, v, weights.nan_to_num(0.0))]
        options = {"chunk_size": self.shape.C, "softmax_off_by_one": self.shape.off_by_one}
        o = hsa_attention_reference(*leaves[:3], indices, leaves[3], **options)
        return [o.detach(), *torch.autograd.grad(o, leaves, grad_o.double())]

    def problem(self) -> Problem:
        shape = self.shape
        return Problem(
            batch=max(shape.B, 1), seq_len=max(shape.T, 1), kv_len=max(shape.S, 1), num_heads=shape.HQ,
            num_kv_heads=shape.H, head_dim=shape.D, value_dim=shape.Dv, chunk_size=shape.C,
            top_k=max(shape.K, 1), dtype=str(self.dtype).removeprefix("torch."),
            softmax_off_by_one=shape.off_by_one, per_head_weights=shape.per_head,
        )  # fmt: skip

    def actual(self, dataflow: str) -> list[Tensor]:
        """o, dq, dk, dv, dw of the emitted kernels."""
        *inputs, grad_o = self.tensors()
        problem, scale = self.problem(), self.shape.D**-0.5
        forward, backward = (
            compile_kernel(emit(problem.with_op(op), schedule(problem, op, dataflow), TARGET)).entry
            for op in ("hsa_forward", "hsa_backward")
        )
        return [forward(*inputs, scale=scale), *backward(*inputs, grad_o, scale=scale)]


def schedule(problem: Problem, op: str, dataflow: str) -> Schedule:
    knobs = {"num_warps": 4, "num_stages": 2}
    block_t = max(1, ROWS // next_power_of_2(problem.group))
    if dataflow == "chunk":
        knobs |= {"block_t": block_t, "segment": 256}
    elif op == "hsa_backward":
        knobs |= {"block_t": block_t, "chunk_warps": 8, "chunk_stages": 2}
    return Schedule.of(dataflow, **knobs)


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, one, other in zip(("o", "dq", "dk", "dv", "dw"), actual, expected, strict=True):
        assert torch.isfinite(one).all(), name
        assert relative_error(one, other) <= tolerance, name


@pytest.fixture(autouse=True)
def _poison() -> None:
    """Memory that a kernel forgets to write is NaN, not the zeros that a fresh process happens to have."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter keeps bfloat16 as its bits in a uint16, and its dot multiplies those (seen in 3.7.1)."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = np.left_shift(x.data.view(np.uint16).astype(np.uint32), 16)
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest),
    )


@pytest.mark.parametrize("dataflow", DATAFLOWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_equal_the_reference(shape: Shape, dataflow: str) -> None:
    case = Case(shape)
    assert_close(case.actual(dataflow), case.expected(), TOLERANCES["float32"])


@pytest.mark.parametrize("dataflow", DATAFLOWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[9]], ids=str)
def test_half_precision_is_close_and_results_have_the_dtypes_of_the_inputs(
    shape: Shape, dtype: torch.dtype, dataflow: str
) -> None:
    case = Case(shape, dtype)
    actual = case.actual(dataflow)
    assert [x.dtype for x in actual] == [dtype, dtype, dtype, dtype, torch.float32]
    assert_close(actual, case.expected(), TOLERANCES["bfloat16"])


@pytest.mark.parametrize("dataflow", DATAFLOWS)
@pytest.mark.parametrize("off_by_one", [False, True])
def test_large_logits_stay_finite_and_right(off_by_one: bool, dataflow: str) -> None:
    case = Case(Shape(logits=1e4, off_by_one=off_by_one))
    (o, dq, dk, dv, dw), (o_expected, _, _, dv_expected, dw_expected) = case.actual(dataflow), case.expected()
    # In float32 a logit of 1e4 is off by 1e-3. The softmax is one-hot but for near ties, dq and dk vanish with it.
    for one, other in ((o, o_expected), (dv, dv_expected), (dw, dw_expected)):
        assert relative_error(one, other) <= 1e-2
    assert torch.isfinite(dq).all()
    assert torch.isfinite(dk).all()


@pytest.mark.parametrize("shape", [Shape(T=300, S=40, HQ=2, K=2), Shape(T=300, S=40, HQ=3, H=1, K=1)], ids=str)
def test_a_hot_chunk_is_split_over_several_programs(shape: Shape) -> None:
    case = Case(shape)
    assert_close(case.actual("chunk"), case.expected(), TOLERANCES["float32"])


@pytest.mark.parametrize("dataflow", DATAFLOWS)
@pytest.mark.parametrize(
    "shape", [Shape(T=0), Shape(K=0), Shape(S=15), Shape(S=0), Shape(B=0)], ids=["T0", "K0", "N0", "S0", "B0"]
)
def test_nothing_to_attend_to_gives_zeros(shape: Shape, dataflow: str) -> None:
    case = Case(shape)
    inputs = case.tensors()
    for result, like in zip(case.actual(dataflow), (inputs[5], *inputs[:3], inputs[4]), strict=True):
        assert result.shape == like.shape
        assert not result.any()


def test_one_module_serves_all_lengths() -> None:
    small, large = Case(Shape()), Case(replace(Shape(), B=2, T=3, S=130, HQ=9, H=3, K=5))
    texts = {
        emit(case.problem(), schedule(case.problem(), "hsa_forward", "chunk"), TARGET).text for case in (small, large)
    }
    assert len(texts) == 1


def test_same_bits_twice() -> None:
    case = Case(Shape(T=11, S=40))
    first, second = case.actual("token"), case.actual("token")
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("num_chunks", [0, 1, 5, 40000])
def test_lists_hold_every_pick_once_in_order(num_chunks: int) -> None:
    B, T, H, K = 2, 13, 3, 4
    indices = torch.randint(-1, 7, (B, T, H, K), generator=torch.Generator().manual_seed(0))
    entries, offsets = inverse_index(indices, num_chunks)
    token_heads, picks = list_addresses(entries, indices.shape)
    assert offsets.shape == (B * H, num_chunks + 1)
    assert {x.dtype for x in (entries, offsets, token_heads, picks)} == {torch.int32}
    flat = indices.movedim(2, 1).flatten(2)  # [B, H, T·K]
    for bh in range(B * H):
        for chunk in range(min(num_chunks, 8)):
            mine = slice(*offsets[bh, chunk : chunk + 2].tolist())
            expected = (flat[bh // H, bh % H] == chunk).nonzero().flatten()
            assert torch.equal(entries[bh, mine].long(), expected)
            assert (indices.flatten()[picks[bh, mine].long()] == chunk).all()
            assert torch.equal(picks[bh, mine] // K, token_heads[bh, mine])


@pytest.mark.parametrize("segment", [1, 4, 100])
def test_tiles_cover_every_list_once(segment: int) -> None:
    indices = torch.randint(-1, 5, (1, 17, 2, 3), generator=torch.Generator().manual_seed(0))
    entries, offsets = inverse_index(indices, 6)
    tiles = split_lists(offsets, segment=segment, num_entries=entries.shape[1])
    assert tiles.shape == (2, 6 + 51 // segment, 3)
    for bh in range(2):
        covered = []
        for chunk, start, stop in tiles[bh].tolist():
            assert stop - start <= segment
            if start < stop:
                assert offsets[bh, chunk] <= start < stop <= offsets[bh, chunk + 1]
                covered += range(start, stop)
        assert covered == list(range(int(offsets[bh, -1])))
