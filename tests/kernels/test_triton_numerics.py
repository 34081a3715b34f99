"""The emitted Triton kernels, interpreted on this CPU, against the float64 reference: outputs and all gradients."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from in_turn import in_turn
from torch import Tensor

from hsa_compile.kernels.compare import TOLERANCES, relative_error
from hsa_compile.kernels.compile import compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.kernels.hsa_attention.reference import hsa_attention_reference
from hsa_compile.problem import Problem, next_power_of_2
from hsa_compile.schedules.schedule import Knob, Schedule
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.target import Target

tl = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("triton.runtime.interpreter")

TARGET = Target.parse("sm_90")
# Dataflow and, for chunk, how parts are added up; `chunk-whole` does not split lists.
VARIANTS = ("token", "union-apart", "chunk", "chunk-slots", "chunk-whole", "fused", "fused-atomic")
DETERMINISTIC = ("token", "union-apart", "chunk-whole")
ROWS = 32  # of a tile: small, so that short lists take several
CANARY, MARGIN = 12345.0, 64


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
    mask_last: bool = False
    packed: tuple[int, ...] = ()  # keys of each of several sequences, S in all
    logits: float = 1.0
    index_dtype: torch.dtype = torch.int32

    def __str__(self) -> str:
        text = f"B{self.B}-T{self.T}-S{self.S}-HQ{self.HQ}-H{self.H}-D{self.D}-Dv{self.Dv}-C{self.C}-K{self.K}"
        text += "-off_by_one" * self.off_by_one + "-per_head" * self.per_head + "-mask_last" * self.mask_last
        return text + "-packed" * bool(self.packed) + f"-x{self.logits:g}"

    @property
    def starts(self) -> list[int]:
        """The key row at which each chunk begins."""
        first, starts = 0, []
        for length in self.packed or (self.S,):
            starts += range(first, first + length - self.C + 1, self.C)
            first += length
        return starts

    @property
    def attended(self) -> Tensor:
        """The key rows of each chunk that are attended to."""
        starts = torch.tensor(self.starts, dtype=torch.long)[:, None]
        return (starts + torch.arange(self.C - self.mask_last)).flatten()


SHAPES = [
    Shape(),
    Shape(B=2, HQ=2, T=5),  # G = 1
    Shape(HQ=32, T=5, K=2, D=16, Dv=16, index_dtype=torch.int64),  # G = 16
    Shape(D=20, Dv=40, C=19),
    Shape(T=1, S=133, K=8),
    Shape(T=1, S=16, HQ=1, H=1, K=1),
    Shape(T=11, S=33, HQ=4, H=1, K=7),  # K beyond the chunks: duplicates and many empty slots
    Shape(off_by_one=True),
    Shape(per_head=True, HQ=3, H=1),
    Shape(off_by_one=True, per_head=True, B=2, T=3),
    Shape(mask_last=True, C=17, off_by_one=True),
    Shape(packed=(20, 15, 40, 16), S=91, K=4),
    Shape(packed=(20, 40), S=60, mask_last=True, per_head=True, HQ=2),
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

        num_chunks = len(shape.starts)
        size = (shape.B, shape.T, shape.H, shape.K)
        indices = torch.randint(-2, num_chunks + 1, size, generator=random)
        indices[:, : shape.T // 2 : 3] = -1
        indices[indices == num_chunks] = 2**31 - 1
        heads = shape.HQ if shape.per_head else shape.H
        weights = torch.rand(shape.B, shape.T, heads, shape.K, generator=random)
        empty = (indices < 0) | (indices >= num_chunks)
        weights[empty.repeat_interleave(heads // shape.H, dim=2)] = float("nan")  # must not be read
        k, v = normal(shape.B, shape.S, shape.H, shape.D), normal(shape.B, shape.S, shape.H, shape.Dv)
        unseen = torch.ones(shape.S, dtype=torch.bool)
        unseen[shape.attended] = False
        k[:, unseen], v[:, unseen] = float("nan"), float("nan")  # must not be read
        return [
            normal(shape.B, shape.T, shape.HQ, shape.D) * shape.logits,
            k,
            v,
            indices.to(shape.index_dtype),
            weights,
            normal(shape.B, shape.T, shape.HQ, shape.Dv),
        ]

    def expected(self) -> list[Tensor]:
        """o, dq, dk, dv, dw in float64."""
        q, k, v, indices, weights, grad_o = self.tensors()
        shape = self.shape
        indices = torch.where(indices < len(shape.starts), indices, -1)
        leaves = [x.double().requires_grad_() for x in (q, k, v, weights.nan_to_num(0.0))]
        # What packing and masking mean: the reference sees the keys that are attended to, and no others.
        keys, values = (x[:, shape.attended] for x in leaves[1:3])
        options = {"chunk_size": shape.C - shape.mask_last, "softmax_off_by_one": shape.off_by_one}
        o = hsa_attention_reference(leaves[0], keys, values, indices, leaves[3], **options)
        return [o.detach(), *torch.autograd.grad(o, leaves, grad_o.double())]

    def problem(self) -> Problem:
        shape = self.shape
        return Problem(
            batch=max(shape.B, 1), seq_len=max(shape.T, 1), kv_len=max(shape.S, 1), num_heads=shape.HQ,
            num_kv_heads=shape.H, head_dim=shape.D, value_dim=shape.Dv, chunk_size=shape.C,
            top_k=max(shape.K, 1), dtype=str(self.dtype).removeprefix("torch."),
            softmax_off_by_one=shape.off_by_one, per_head_weights=shape.per_head,
            mask_last_token=shape.mask_last, packed=bool(shape.packed),
        )  # fmt: skip

    def actual(self, variant: str, super_tile: int = 0) -> list[Tensor]:
        """o, dq, dk, dv, dw of the emitted kernels; nothing around any of the buffers may be touched."""
        *inputs, grad_o = self.tensors()
        options: dict[str, object] = {"scale": self.shape.D**-0.5}
        if self.shape.packed:  # one chunk more than there are, which begins nowhere
            options["chunk_starts"] = torch.tensor([*self.shape.starts, 10**6], dtype=torch.int32)
        problem = self.problem()
        forward, backward = (
            compile_kernel(emit(problem.with_op(op), schedule(problem, op, variant, super_tile), TARGET)).entry
            for op in ("hsa_forward", "hsa_backward")
        )
        with canaries():
            return [forward(*inputs, **options), *backward(*inputs, grad_o, **options)]


def schedule(problem: Problem, op: str, variant: str, super_tile: int = 0) -> Schedule:
    dataflow, _, adding = variant.partition("-")
    knobs: dict[str, Knob] = {"num_warps": 4, "num_stages": 2}
    block_entries = max(1, ROWS // next_power_of_2(problem.group))
    if dataflow == "chunk":
        reduction = {"": "atomic", "whole": "slots"}.get(adding, adding)
        segment = 0 if op == "hsa_backward" and adding == "whole" else 128
        knobs |= {"block_entries": block_entries, "segment": segment, "super_tile": super_tile}
        knobs["reduce"] = reduction
    elif dataflow == "fused":
        segment = max(16, 64 // next_power_of_2(problem.group))
        knobs |= {"super_tile": super_tile or 128, "segment": segment, "unroll": 8, "discard": 0, "window": 0}
        knobs["reduce"] = "slots" if adding and op == "hsa_forward" else adding or "fused"
    elif op == "hsa_backward":
        knobs |= {"block_entries": block_entries, "chunk_warps": 8, "chunk_stages": 2}
        knobs["dk_dv"] = "apart" if adding == "apart" else "together"
    if dataflow == "union":
        knobs["block_tokens"] = max(1, ROWS // next_power_of_2(problem.group))
    return Schedule.of(dataflow, **knobs)


@contextmanager
def canaries() -> Iterator[None]:
    """Floats that PyTorch allocates meanwhile lie between margins, which must still be whole at the end."""
    guarded: list[Tensor] = []

    def surround(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            x = allocate(*args, **kwargs)
            if not (x.is_floating_point() and x.numel()):
                return x
            whole = x.new_full((x.numel() + 2 * MARGIN,), CANARY)
            guarded.append(whole)
            return whole[MARGIN:-MARGIN].view(x.shape).copy_(x)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in ((torch, ("empty", "zeros", "empty_like", "zeros_like")), (Tensor, ("new_empty",))):
            for name in names:
                patch.setattr(owner, name, surround(getattr(owner, name)))
        yield
    for whole in guarded:
        assert (whole[:MARGIN] == CANARY).all()
        assert (whole[-MARGIN:] == CANARY).all()


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


@pytest.mark.parametrize(("shape", "variant"), in_turn(SHAPES, VARIANTS, 2), ids=str)
def test_output_and_gradients_equal_the_reference(shape: Shape, variant: str) -> None:
    case = Case(shape)
    assert_close(case.actual(variant), case.expected(), TOLERANCES["float32"])


HALVES = [Case(SHAPES[9], torch.bfloat16), Case(SHAPES[0], torch.float16)]


@pytest.mark.parametrize(("case", "variant"), in_turn(HALVES, ("chunk-slots16", "token", *VARIANTS[1:]), 3))
def test_half_precision_is_close_and_results_have_the_dtypes_of_the_inputs(case: Case, variant: str) -> None:
    dtype = case.dtype
    actual = case.actual(variant)
    assert [x.dtype for x in actual] == [dtype, dtype, dtype, dtype, torch.float32]
    assert_close(actual, case.expected(), TOLERANCES["bfloat16"])


@pytest.mark.parametrize(("off_by_one", "variant"), in_turn([False, True], VARIANTS, 3))
def test_large_logits_stay_finite_and_right(off_by_one: bool, variant: str) -> None:
    case = Case(Shape(logits=1e4, off_by_one=off_by_one))
    (o, dq, dk, dv, dw), (o_expected, _, _, dv_expected, dw_expected) = case.actual(variant), case.expected()
    # In float32 a logit of 1e4 is off by 1e-3. The softmax is one-hot but for near ties, dq and dk vanish with it.
    for one, other in ((o, o_expected), (dv, dv_expected), (dw, dw_expected)):
        assert relative_error(one, other) <= 1e-2
    assert torch.isfinite(dq).all()
    assert torch.isfinite(dk).all()


@pytest.mark.parametrize(
    "shape",
    [Shape(T=300, S=40, HQ=2, K=2), pytest.param(Shape(T=300, S=40, HQ=3, H=1, K=1), marks=pytest.mark.slow)],
    ids=str,
)
def test_a_hot_chunk_is_split_over_several_programs(shape: Shape) -> None:
    case = Case(shape)
    assert_close(case.actual("chunk-slots"), case.expected(), TOLERANCES["float32"])


@pytest.mark.parametrize(
    "variant", ["chunk-slots", *(pytest.param(name, marks=pytest.mark.slow) for name in ("chunk", "chunk-whole"))]
)
def test_super_tiles_add_up(variant: str) -> None:
    case = Case(Shape(B=2, T=1030, S=20, HQ=1, H=1, D=16, Dv=16, K=1))
    assert_close(case.actual(variant, super_tile=1024), case.expected(), TOLERANCES["float32"])


@pytest.mark.parametrize(
    "shape",
    [pytest.param(Shape(T=70, S=20, K=2), marks=pytest.mark.slow), Shape(T=9, S=20, K=9, per_head=True)],
    ids=str,
)
def test_a_block_that_picks_a_chunk_more_often_than_it_has_tokens_visits_it_again(shape: Shape) -> None:
    case = Case(shape)
    assert_close(case.actual("union-apart"), case.expected(), TOLERANCES["float32"])


@pytest.mark.parametrize(
    ("shape", "variant"), in_turn([Shape(T=0), Shape(K=0), Shape(S=15), Shape(S=0), Shape(B=0)], VARIANTS, 2), ids=str
)
def test_nothing_to_attend_to_gives_zeros(shape: Shape, variant: str) -> None:
    case = Case(shape)
    inputs = case.tensors()
    for result, like in zip(case.actual(variant), (inputs[5], *inputs[:3], inputs[4]), strict=True):
        assert result.shape == like.shape
        assert not result.any()


def test_a_write_outside_of_a_buffer_is_seen() -> None:
    def write_past_the_end() -> None:
        with canaries():
            x = torch.empty(3)
            x.as_strided((1,), (1,), x.storage_offset() + 3).zero_()

    with pytest.raises(AssertionError):
        write_past_the_end()


def test_one_module_serves_all_lengths() -> None:
    small, large = Case(Shape()), Case(replace(Shape(), B=2, T=3, S=130, HQ=9, H=3))
    texts = {
        emit(case.problem(), schedule(case.problem(), "hsa_forward", "chunk"), TARGET).text for case in (small, large)
    }
    assert len(texts) == 1


@pytest.mark.slow
@pytest.mark.parametrize("variant", DETERMINISTIC)
def test_same_bits_twice(variant: str) -> None:
    case = Case(Shape(T=7, S=40))
    first, second = case.actual(variant), case.actual(variant)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    strict = replace(case.problem(), deterministic=True)
    for op in ("hsa_forward", "hsa_backward"):
        space = SearchSpace.of(strict.with_op(op), TARGET)
        assert space.is_valid(schedule(strict, op, variant))
