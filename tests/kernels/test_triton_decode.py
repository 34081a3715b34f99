"""The emitted Triton kernels of decoding: interpreted against the reference, and compiled for absent GPUs."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from decode_cases import SHAPES, Case, Shape
from in_turn import in_turn

from hsa_compile.kernels.compare import TOLERANCES, relative_error
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
    return Schedule.of("split", num_splits=split, num_warps=4, num_stages=2)


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


SCRIPT = """
import itertools, json, sys
from dataclasses import asdict
from types import SimpleNamespace
from hsa_compile.kernels.ahead_of_time import compile_launches
from hsa_compile.kernels.compile import compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.problem import Problem
from hsa_compile.schedules.space import default_schedule
from hsa_compile.schedules.ops.limits import token_shared_memory
from hsa_compile.target import Target

rows = []
archs, every = json.loads(sys.argv[1])
for turn, arch in enumerate(archs):
    target = Target.parse(arch)
    # One sequence is split over programs, many are not; a slice of dtype x D x C.
    points = itertools.product((1, 4, 16), ((1, 2, False), (64, 8, True)),
                               (("bfloat16", 64, 64), ("float16", 128, 128), ("bfloat16", 128, 32)))
    for number, (group, (batch, heads, paged), (dtype, dim, chunk)) in enumerate(points):
        if not every and number != 5 * turn:
            continue
        problem = Problem(op="hsa_decode", batch=batch, seq_len=1, kv_len=65536, num_heads=heads * group,
                          num_kv_heads=heads, head_dim=dim, chunk_size=chunk, top_k=16, dtype=dtype, paged=paged)
        schedule = default_schedule(problem, target)
        module = compile_kernel(emit(problem, schedule, target)).module
        for kernel in compile_launches(module, target):
            row = asdict(kernel)
            row.pop("asm")
            rows.append({"arch": arch, "problem": problem.describe(), "schedule": str(schedule), **row,
                         "least": token_shared_memory(problem, target, 1, min(schedule.number("num_stages"), 2))[0]})

# Sizes of one, which Triton makes constants.
ones = {name: "constexpr" for name in ("T", "H", "K", "N", "P")}
launch = {**module.LAUNCHES[0], "constants": dict.fromkeys(ones, 1)}
launch["signature"] = {**launch["signature"], **ones}
compile_launches(SimpleNamespace(LAUNCHES=[launch]), target)
print(json.dumps(rows))
"""


@pytest.fixture(scope="module", params=["in turns", pytest.param("every point", marks=pytest.mark.exhaustive)])
def compiled(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """All compiling is in one other process: this one interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT, json.dumps([TARGETS, request.param == "every point"])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_default_schedules_fit_and_do_not_spill(compiled: list[dict[str, Any]]) -> None:
    assert {row["name"] for row in compiled} == {"_hsa_decode_split", "_sum_parts"}
    assert {row["arch"] for row in compiled} == set(TARGETS)
    for row in compiled:
        arch = row["arch"]
        assert row["spills"] == 0, row
        assert row["shared_memory"] <= Target.parse(arch).shared_memory, row
        if row["name"] == "_hsa_decode_split":
            assert row["matrix_instruction"] == ("MFMA" if arch == "gfx942" else "HMMA"), row
            assert row["shared_memory"] >= row["least"], row
