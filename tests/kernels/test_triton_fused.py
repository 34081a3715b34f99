"""The kernels that add parts up in the launch that makes them, interpreted: the same bits in any order."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_triton_numerics import TARGET, TOLERANCES, Case, Shape, canaries
from torch import Tensor

from hsa_compile.kernels.compare import relative_error
from hsa_compile.kernels.compile import Kernel, compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.kernels.hsa_attention import pick_lists
from hsa_compile.kernels.inverse_index import super_tile_lists
from hsa_compile.problem import OPS, Problem, next_power_of_2
from hsa_compile.schedules.schedule import Knob, Schedule
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.target import Target

tl = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("triton.runtime.interpreter")

# Several super-tiles, the last one of a few tokens; duplicates, empty rows, and for single heads blocks of 16 tokens.
MANY = Shape(B=1, T=131, S=40, HQ=2, H=2, D=16, Dv=16, K=4)
SHAPES = [
    MANY,
    Shape(T=1, S=16, HQ=1, H=1, K=1),
    Shape(T=11, S=33, HQ=12, H=1, K=9),  # a group that is padded, K beyond the chunks and no power of two
    Shape(B=2, T=5, HQ=32, H=2, K=2, D=16, Dv=16, per_head=True, index_dtype=torch.int64),
    Shape(packed=(20, 15, 40, 16), S=91, K=4, HQ=2),
    Shape(D=20, Dv=40, C=19, mask_last=True, off_by_one=True),
]
KNOBS: dict[str, Knob] = {
    "reduce": "fused", "window": 0, "super_tile": 128, "unroll": 8, "discard": 0, "num_warps": 4, "num_stages": 2
}  # fmt: skip


def kernel(case: Case, op: str = "hsa_forward", **change: Knob) -> Kernel:
    """A fused kernel, in the space of long sequences: what is emitted does not depend on how long they are."""
    problem = replace(case.problem(), op=op, seq_len=65536)
    segment = max(16, 64 // next_power_of_2(problem.group))
    schedule = Schedule.of("fused", **{**KNOBS, "segment": segment, **change})
    return compile_kernel(emit(problem, schedule, TARGET))


def results(case: Case, kernel: Kernel) -> list[Tensor]:
    """o, or dq, dk, dv and dw."""
    options: dict[str, object] = {"scale": case.shape.D**-0.5}
    if case.shape.packed:
        options["chunk_starts"] = torch.tensor([*case.shape.starts, 10**6], dtype=torch.int32)
    inputs = case.tensors()
    with canaries():
        if kernel.source.problem.op == "hsa_forward":
            return [kernel.entry(*inputs[:5], **options)]
        return list(kernel.entry(*inputs, **options))


@pytest.fixture(autouse=True)
def _poison() -> None:
    """Memory that a kernel forgets to write is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def run_in_order(monkeypatch: pytest.MonkeyPatch, seed: int | None) -> None:
    """Have programs of a launch run in reverse, or in an order drawn with a seed, as a GPU may."""
    set_grid_idx = interpreter.InterpreterBuilder.set_grid_idx

    def reordered(self, x: int, y: int, z: int) -> None:
        order = np.arange(self.grid_dim[0])[::-1]
        if seed is not None:
            order = np.random.default_rng(seed).permutation(order)
        set_grid_idx(self, int(order[x]), y, z)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", reordered)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_output_equals_the_reference_in_any_order_of_programs(
    shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(shape)
    forward = kernel(case)
    (first,) = results(case, forward)
    assert relative_error(first, case.expected()[0]) <= TOLERANCES["float32"]
    for seed in (None, 0):
        with monkeypatch.context() as patch:
            run_in_order(patch, seed)
            assert torch.equal(results(case, forward)[0], first)


@pytest.mark.parametrize(
    ("shape", "reduce"), [(MANY, "fused"), (SHAPES[2], "atomic"), (SHAPES[3], "slots"), (SHAPES[4], "fused")], ids=str
)
def test_the_gradients_equal_the_reference_in_any_order_of_programs(
    shape: Shape, reduce: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(shape)
    backward = kernel(case, "hsa_backward", reduce=reduce)
    first, expected = results(case, backward), case.expected()[1:]
    run_in_order(monkeypatch, 0)
    again = results(case, backward)
    for one, other in ((first, expected), (again, expected)):
        for name, gradient, wanted in zip(("dq", "dk", "dv", "dw"), one, other, strict=True):
            assert relative_error(gradient, wanted) <= TOLERANCES["float32"], name
    if reduce != "atomic":
        assert torch.equal(first[0], again[0])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("reduce", "window"), [("fused", 32), ("slots", 32), ("slots", 150)])
def test_windows_of_a_part_of_a_row_or_of_two_rows_add_nothing_twice(
    reduce: str, window: int, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(replace(MANY, B=3, T=70, per_head=True, HQ=4))
    windows = kernel(case, op, reduce=reduce, window=16384)
    monkeypatch.setattr(windows.module, "WINDOW", window)
    expected = case.expected()
    for result, wanted in zip(
        results(case, windows), expected[:1] if op == "hsa_forward" else expected[1:], strict=True
    ):
        assert relative_error(result, wanted) <= TOLERANCES["float32"]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("limit", ["MOST_SORTED", "MOST_COUNTED", "MOST_LISTS"])
def test_picks_sorted_block_by_block_or_by_pytorch_give_the_same(
    limit: str, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(MANY)
    compiled = kernel(case, op)
    first = results(case, compiled)
    # A row has the picks of 16 tokens, an eighth of a super-tile; or PyTorch sorts all.
    monkeypatch.setattr(pick_lists, limit, {"MOST_SORTED": 16 * MANY.K, "MOST_COUNTED": 0, "MOST_LISTS": 1}[limit])
    assert all(torch.equal(one, other) for one, other in zip(results(case, compiled), first, strict=True))


@pytest.mark.parametrize("shape", [MANY, SHAPES[3]], ids=str)
def test_only_slots_that_nobody_reads_again_are_discarded(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(shape)
    kept, discarding = kernel(case), kernel(case, discard=1)
    discarded = []

    def overwrite(place: tl.tensor) -> None:
        """What an interpreter has no cache for: the line loses what it holds."""
        discarded.append(len(np.unique(place.handle.data)))
        line = tl.arange(0, discarding.module.LINE.value)[None, :]
        tl.store(place[:, None] + line, tl.full([256, line.shape[1]], float("nan"), tl.float32))

    monkeypatch.setattr(discarding.module, "DISCARDS", True)
    monkeypatch.setattr(discarding.module, "_discard", overwrite)
    run_in_order(monkeypatch, 0)
    assert torch.equal(results(case, discarding)[0], results(case, kept)[0])
    assert sum(discarded) > 0


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [Shape(T=0), Shape(K=0), Shape(S=15), Shape(S=0), Shape(B=0)], ids=str)
def test_nothing_to_attend_to_gives_zeros(shape: Shape, op: str) -> None:
    case = Case(shape)
    inputs = case.tensors()
    like = [inputs[5]] if op == "hsa_forward" else [*inputs[:3], inputs[4]]
    for result, other in zip(results(case, kernel(case, op)), like, strict=True):
        assert result.shape == other.shape
        assert not result.any()


@pytest.mark.parametrize("super_tile", [1, 4, 100])
def test_lists_of_super_tiles_hold_every_pick_once(super_tile: int) -> None:
    B, T, H, K, N = 2, 13, 3, 4, 5
    indices = torch.randint(-1, N + 1, (B, T, H, K), generator=torch.Generator().manual_seed(0))
    entries, tiles = super_tile_lists(indices, N, super_tile=super_tile, segment=3)
    for bh in range(B * H):
        picks = indices[bh // H, :, bh % H].flatten().tolist()
        served = []
        order = []
        for chunk, start, stop in tiles[bh].tolist():
            mine = entries[bh, start:stop].tolist()
            assert len(mine) <= 3
            assert all(picks[entry] == chunk for entry in mine)
            order += [(entry // K // super_tile, chunk, entry) for entry in mine]
            served += mine
        assert order == sorted(order)
        assert sorted(served) == [entry for entry, chunk in enumerate(picks) if 0 <= chunk < N]


LARGE = Problem(seq_len=65536, num_heads=32, num_kv_heads=2, head_dim=128, top_k=16, dtype="bfloat16")


@pytest.mark.parametrize(
    ("problem", "target", "change", "reason"),
    [
        (LARGE, "gfx942", {}, "which the dies of this device do not share"),
        (replace(LARGE, num_heads=64), "sm_90", {}, "at most 16 heads, this one has 32"),
        (replace(LARGE, seq_len=1 << 20, kv_len=1 << 20), "sm_90", {}, "slots of 1048576 tokens take"),
        (LARGE, "sm_90", {"segment": 512}, "makes 8192 rows a program, allowed are 64 … 4096"),
        (LARGE, "sm_90", {"window": 65536}, "window = 65536 is no less than the 65536 tokens there are; use 0"),
        (LARGE, "sm_90", {"window": 16384, "super_tile": 32768}, "is less than super_tile = 32768"),
        (LARGE, "sm_90", {"reduce": "slots", "unroll": 16}, "parts that are added up in the same launch; use 8"),
        (replace(LARGE, num_kv_heads=32), "sm_90", {}, "makes 16 rows a program, allowed are 64 … 4096"),
        (LARGE, "sm_90", {"super_tile": 2048}, "a cache keeps 100663296"),
        (replace(LARGE, seq_len=300), "sm_90", {"super_tile": 1024}, "is more than the 300 tokens there are"),
        (replace(LARGE, top_k=8), "sm_90", {"unroll": 16}, "unroll = 16 is more than the 8 slots there are"),
        (replace(LARGE, value_dim=3, top_k=1), "sm_90", {"discard": 1}, "the slots of a token have 96"),
    ],
)
def test_what_the_forward_cannot_do_is_said(problem: Problem, target: str, change: dict[str, int], reason: str) -> None:
    space = SearchSpace.of(problem, Target.parse(target))
    usual = {**KNOBS, "super_tile": 512, "segment": 16}
    schedule = Schedule.of("fused", **{**usual, **change})
    assert reason in (space.why_invalid(schedule) or "")


@pytest.mark.parametrize(
    ("options", "change", "reason"),
    [
        ({"deterministic": True}, {}, "adds dk and dv in any order"),
        ({}, {"unroll": 16}, "unroll = 16 is for parts that are added up in the same launch; use 8"),
        ({}, {"segment": 4096}, "makes 65536 rows a program, allowed are 64 … 16384"),
        ({}, {"reduce": "fused", "super_tile": 4096}, "a cache keeps 100663296"),
        ({}, {"window": 16384}, "window = 16384 bounds the memory of slots, which reduce = 'atomic' has not; use 0"),
        ({}, {"window": 65536, "reduce": "slots"}, "window = 65536 is no less than the 65536 tokens there are; use 0"),
    ],
)
def test_what_the_backward_cannot_do_is_said(options: dict[str, bool], change: dict[str, Knob], reason: str) -> None:
    space = SearchSpace.of(replace(LARGE, op="hsa_backward", **options), TARGET)
    usual = {**KNOBS, "reduce": "atomic", "super_tile": 2048, "segment": 256}
    assert reason in (space.why_invalid(Schedule.of("fused", **{**usual, **change})) or "")


def test_a_schedule_of_a_long_sequence_fits_a_short_one() -> None:
    usual = {**KNOBS, "segment": 16}
    long = Schedule.of("fused", **{**usual, "super_tile": 512, "unroll": 16, "window": 16384})
    space = SearchSpace.of(replace(LARGE, seq_len=100, top_k=4, deterministic=True), TARGET)
    fitted = space.fit(long)
    assert fitted == Schedule.of("fused", **usual)
    assert space.is_valid(fitted)
