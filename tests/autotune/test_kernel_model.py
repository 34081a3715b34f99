import json
from dataclasses import replace
from pathlib import Path

import pytest

from hsa_compile.autotune.cost.predict_schedule import spearman
from hsa_compile.autotune.cost.roofline import estimate, predict
from hsa_compile.errors import InvalidTarget
from hsa_compile.kernels.ahead_of_time import KernelResources
from hsa_compile.peaks import limits_of
from hsa_compile.problem import OPS, Problem
from hsa_compile.schedules.ops import count_work
from hsa_compile.schedules.ops.hsa_attention.cost import attention_passes
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.target import NAMED_TARGETS, PRODUCTS, Target

PROBLEM = Problem(
    seq_len=16384, num_heads=32, num_kv_heads=2, head_dim=128, chunk_size=64, top_k=16, dtype="bfloat16"
)  # fmt: skip
H100 = PRODUCTS["h100"]
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "schedules_h100.json"
TOKEN = Schedule.of("token", num_warps=4, num_stages=2)
KERNEL = KernelResources(
    name="_hsa_forward_token", registers=128, spills=0, shared_memory=32768, num_warps=4, matrix_instruction="HGMMA"
)  # fmt: skip


def chunk(**knobs: int | str) -> Schedule:
    usual = {"block_entries": 4, "segment": 512, "super_tile": 0, "num_warps": 4, "num_stages": 2, "reduce": "slots"}
    return Schedule.of("chunk", **{**usual, **knobs})


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("target", [*NAMED_TARGETS.values(), *PRODUCTS.values()], ids=lambda target: target.slug)
def test_every_valid_schedule_has_a_time_above_the_lower_bound(target: Target, op: str) -> None:
    problem = PROBLEM.with_op(op)
    schedules = list(SearchSpace.of(problem, target).schedules())
    assert schedules
    for schedule in schedules[:: max(1, len(schedules) // 60)]:
        work = count_work(problem, schedule)
        least = work.flops / 2 / predict_peak(target) / 1e9
        assert estimate(problem, schedule, target) > least


def predict_peak(target: Target) -> float:
    """TFLOP/s at which the matrix clock of `predict` runs."""
    work = count_work(PROBLEM, TOKEN)
    only_matrix = replace(work, memory_bytes=0.0, cache_bytes=0.0)
    return work.flops / predict(PROBLEM, only_matrix, target).time_ms / 1e9


def test_tiles_padded_for_a_small_group_cost_more() -> None:
    small = replace(PROBLEM, num_heads=2)  # a group of one fills a sixteenth of a tile
    assert estimate(small, TOKEN, H100) > 0.5 * estimate(PROBLEM, TOKEN, H100)


def test_neighbours_that_share_their_picks_read_less() -> None:
    blocks = [Schedule.of("union", block_tokens=m, num_warps=4, num_stages=2) for m in (1, 4)]
    few_heads = replace(PROBLEM, num_heads=8)
    assert estimate(few_heads, blocks[1], H100) < estimate(few_heads, blocks[0], H100)


def test_slots_of_half_the_bytes_cost_less() -> None:
    assert estimate(PROBLEM, chunk(reduce="slots16"), H100) < estimate(PROBLEM, chunk(), H100)


def test_atomic_sums_move_less_memory_where_the_cache_holds_what_is_added_to() -> None:
    at_once, in_tiles = (
        attention_passes(PROBLEM, chunk(reduce="atomic", super_tile=tokens), limits_of(H100))[0] for tokens in (0, 1024)
    )
    assert in_tiles.memory_bytes < at_once.memory_bytes
    assert in_tiles.launches > 10 * at_once.launches  # each super-tile is indexed anew


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kv_heads", [2, 8, 32])
def test_the_order_of_what_was_timed_on_an_h100_is_that_of_the_model(op: str, kv_heads: int) -> None:
    problem = Problem(
        op=op, seq_len=65536, num_heads=32, num_kv_heads=kv_heads, head_dim=128, top_k=16, dtype="bfloat16"
    )
    space, pairs = SearchSpace.of(problem, H100), []
    for row in json.loads(RESULTS.read_text(encoding="utf-8"))["timed"]:
        schedule = Schedule.parse(row["schedule"])
        if (row["op"], row["num_kv_heads"]) == (op, kv_heads) and space.is_valid(schedule):
            pairs.append((estimate(problem, schedule, H100), row["random_ms"] * row["trained_ms"]))
    assert len(pairs) >= 50
    assert spearman(*zip(*pairs, strict=True)) >= 0.7


def test_few_resident_warps_and_old_instructions_cost_more() -> None:
    usual = estimate(PROBLEM, TOKEN, H100, [KERNEL])
    assert estimate(PROBLEM, TOKEN, H100, [replace(KERNEL, shared_memory=200 * 1024)]) > usual
    assert estimate(PROBLEM, TOKEN, H100, [replace(KERNEL, matrix_instruction="none")]) > usual


def test_more_bandwidth_is_never_slower() -> None:
    for schedule in (TOKEN, chunk(), chunk(reduce="atomic")):
        assert estimate(PROBLEM, schedule, PRODUCTS["h200"]) <= estimate(PROBLEM, schedule, H100)
    assert estimate(PROBLEM, chunk(), PRODUCTS["h200"]) < estimate(PROBLEM, chunk(), H100)


def test_selection_and_decoding_have_the_plain_rooflines_time() -> None:
    problem = Problem(op="select_chunks", seq_len=4096, num_heads=2, num_kv_heads=2, head_dim=64, top_k=8)
    space = SearchSpace.of(problem, H100)
    schedule = next(space.schedules())
    assert estimate(problem, schedule, H100) == predict(problem, space.work(schedule), H100).time_ms


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(InvalidTarget, match="sm_75 are not known"):
        estimate(PROBLEM, TOKEN, replace(H100, arch="sm_75", name="Some GPU"))
