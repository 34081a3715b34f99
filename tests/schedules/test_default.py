import itertools
import random
from dataclasses import replace

import pytest

from hsa_compile.errors import InvalidSchedule
from hsa_compile.problem import DTYPES, OPS, Problem, next_power_of_2
from hsa_compile.schedules.space import SearchSpace, default_schedule
from hsa_compile.target import NAMED_TARGETS, Target


def cpu_of(arch: str, *, has_compiler: bool) -> Target:
    return Target(kind="cpu", name="test", arch=arch, num_cores=2, has_compiler=has_compiler)


TARGETS = {
    "cpu": cpu_of("avx2", has_compiler=False),
    "cpu-avx2": cpu_of("avx2", has_compiler=True),
    "cpu-avx512": cpu_of("avx512", has_compiler=True),
    "cpu-other": cpu_of("scalar", has_compiler=True),
    **{name: NAMED_TARGETS[name] for name in ("sm_80", "sm_90", "gfx942")},
}


def runs_on(dtype: str, target: Target) -> bool:
    return target.kind == "cpu" or dtype != "float64"


SHAPES = {
    "op": OPS,
    "seq_len": (1, 7, 16384, 1 << 20),
    "group": (1, 3, 16, 64),
    "top_k": (1, 8, 64),
    "chunk_size": (16, 64, 128),
    "head_dim": (16, 64, 80, 128, 256),
    "dtype": DTYPES,
    "deterministic": (False, True),
}


@pytest.mark.parametrize("count", [400, pytest.param(None, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_the_default_is_valid(target: Target, count: int | None) -> None:
    shapes = [dict(zip(SHAPES, values, strict=True)) for values in itertools.product(*SHAPES.values())]
    for shape in random.Random(target.arch).sample(shapes, count or len(shapes)):
        group = shape.pop("group")
        if not runs_on(shape["dtype"], target):
            continue
        problem = Problem(num_heads=2 * group, num_kv_heads=2, **shape)
        space = SearchSpace.of(problem, target)
        try:
            schedule = default_schedule(problem, target)
        except InvalidSchedule as error:
            refusal = str(error)
        else:
            reason = space.why_invalid(schedule)
            assert reason is None, f"{problem.describe()}: {schedule}: {reason}"
            continue
        # Keys, values and their gradients of one such chunk are more than a program can hold.
        assert target.kind != "cpu"
        assert problem.chunk_size * next_power_of_2(problem.head_dim) * problem.itemsize >= 64 * 1024
        assert "bytes of shared memory" in refusal
        assert next(space.schedules(), None) is None


@pytest.mark.parametrize("kv_len", [1, 63, 1 << 20])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_the_default_is_valid_where_keys_and_queries_differ_in_number(target: Target, kv_len: int) -> None:
    for op, seq_len in itertools.product(OPS, (1, 129)):
        problem = Problem(op=op, seq_len=seq_len, kv_len=kv_len, num_heads=4, num_kv_heads=1, head_dim=64, top_k=8)
        assert SearchSpace.of(problem, target).is_valid(default_schedule(problem, target))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("target", [t for t in TARGETS.values() if t.kind != "cpu"], ids=lambda target: target.arch)
def test_a_problem_without_any_schedule_is_refused_with_the_reason(target: Target, op: str) -> None:
    problem = Problem(op=op, seq_len=129, num_heads=4, num_kv_heads=1, head_dim=64, top_k=8, dtype="float64")
    with pytest.raises(InvalidSchedule, match=f"float64 on {target.arch}: dtype = 'float64'"):
        default_schedule(problem, target)


@pytest.mark.parametrize("kv_heads", [2, 8])
def test_super_tiles_on_hopper_keep_their_picks_a_chunk_where_there_are_more_chunks(kv_heads: int) -> None:
    usual = Problem(
        op="hsa_backward", seq_len=65536, num_heads=32, num_kv_heads=kv_heads, head_dim=128, top_k=16, dtype="bfloat16"
    )
    short, long = (
        default_schedule(replace(usual, seq_len=tokens, kv_len=tokens), NAMED_TARGETS["sm_90"])
        for tokens in (65536, 1 << 20)
    )
    assert (short.dataflow, long.dataflow) == ("fused", "fused")
    assert (short["window"], long["window"]) == (0, 65536)
    assert long["super_tile"] == min(65536, 16 * short.number("super_tile"))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kv_heads", [4, 32])
def test_many_rows_on_hopper_keep_the_slots_of_some_at_a_time(op: str, kv_heads: int) -> None:
    rows = Problem(
        op=op, batch=64, seq_len=8192, num_heads=32, num_kv_heads=kv_heads, head_dim=128, top_k=16, dtype="bfloat16"
    )
    chosen = default_schedule(rows, NAMED_TARGETS["sm_90"])
    assert (chosen["reduce"], chosen["window"]) == ("slots", 65536)
