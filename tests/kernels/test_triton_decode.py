"""The emitted Triton kernels of decoding: interpreted against the reference, and compiled for absent GPUs."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from decode_cases import SHAPES, Case, Shape
from in_turn import in_turn

from hsa_compile.autotune.check import TOLERANCES, relative_error
from hsa_compile.kernels.emit import emit
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import Target

tl = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("triton.runtime.interpreter")

HOPPER = Target.parse("sm_90")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
MORE_SHAPES = [
    Shape(B=1, HQ=16, H=1, D=40, K=3, P=4),  # G = 16
    Shape(B=1, HQ=20, H=1, D=16, Dv=16, K=2, P=4, N=3),  # G = 20: rows beyond one matrix instruction
]


def split_schedule(split: int) -> Schedule:
    return Schedule.of("split", split=split, num_warps=4, num_stages=2)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
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


@pytest.mark.parametrize(
    ("shape", "split"), in_turn([*(s for s in SHAPES if s.K < 30 and s.T < 16), *MORE_SHAPES], (2, 8, 1), 2), ids=str
)
def test_output_equals_the_reference(shape: Shape, split: int) -> None:
    split = min(split, 1 << (shape.K - 1).bit_length())
    case = Case(shape, index_dtype=torch.int64 if shape.N else torch.int32)
    o = case.run(split_schedule(split), HOPPER)
    assert relative_error(o, case.expected()) <= TOLERANCES["float32"]
    assert not o[0, 0, : shape.HQ // shape.H].any()


@pytest.mark.parametrize(("dtype", "split"), [(torch.bfloat16, 4), (torch.float16, 1)], ids=str)
def test_half_precision_is_close(dtype: torch.dtype, split: int) -> None:
    case = Case(Shape(N=7, per_head=True), dtype)
    o = case.run(split_schedule(split), HOPPER)
    assert o.dtype == dtype
    assert relative_error(o, case.expected()) <= TOLERANCES["bfloat16"]


@pytest.mark.slow
def test_same_bits_twice() -> None:
    case = Case(Shape(N=7))
    assert torch.equal(case.run(split_schedule(4), HOPPER), case.run(split_schedule(4), HOPPER))


def test_pages_of_an_interleaved_pool_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(Shape())
    (q, k, v, indices, weights), table = case.tensors()
    expected = case.expected()
    pool = torch.stack([k, v], dim=1)  # [P, 2, H, C, D]
    monkeypatch.setattr(Case, "tensors", lambda self: ([q, pool[:, 0], pool[:, 1], indices, weights], table))
    assert relative_error(case.run(split_schedule(2), HOPPER), expected) <= TOLERANCES["float32"]


def test_one_module_serves_all_lengths() -> None:
    small, large = Shape(K=8), Shape(B=7, T=3, HQ=9, H=3, P=50, K=40)
    assert len({emit(Case(shape).problem(), split_schedule(8), HOPPER).text for shape in (small, large)}) == 1
