"""What `hsa_attention` costs: FLOPs and bytes on any backend, and in Triton each kernel with its padding."""

import functools
import math
from dataclasses import dataclass

from hsa_compile.peaks import Limits
from hsa_compile.problem import Problem, next_power_of_2
from hsa_compile.schedules.ops.backend import OVERLAP, Pass, Work
from hsa_compile.schedules.ops.limits import MIN_ROWS, fused_step, tile_rows
from hsa_compile.schedules.schedule import Schedule

# What follows is fitted to times on an H100 (benchmarks/results/schedules_h100.json).
_SORTED_BYTES = 128  # sorting a pick takes as long as moving so many bytes of memory
_ADDED = 0.9  # the share of the parts that are added up in memory, where 2 is each of them read and written
_INDEX_LAUNCHES = 5  # small kernels that index one super-tile; the first is not counted


def attention_work(problem: Problem, schedule: Schedule) -> Work:
    """FLOPs and bytes of one pass when all slots are filled."""
    size, backward = problem.itemsize, problem.op == "hsa_backward"
    tokens = problem.batch * problem.seq_len
    rows = tokens * problem.num_heads * problem.top_k
    lists = tokens * problem.num_kv_heads * problem.top_k
    D, Dv, C = problem.head_dim, problem.value_dim, problem.chunk_size
    q_bytes = tokens * problem.num_heads * D * size
    o_bytes = tokens * problem.num_heads * Dv * size
    kv_bytes = problem.batch * problem.kv_len * problem.num_kv_heads * (D + Dv) * size
    pick_bytes = lists * 8
    two_pass = backward and schedule.dataflow not in ("chunk", "fused")
    products = D + Dv if not backward else 4 * D + 3 * Dv if two_pass else 3 * D + 2 * Dv
    memory = (q_bytes + o_bytes + kv_bytes) * (2 if backward else 1) + pick_bytes

    shared = 1.0
    if schedule.dataflow == "union":  # M tokens read the union of their picks once
        shared = (1 + (schedule.number("block_tokens") - 1) * (1 - OVERLAP)) / schedule.number("block_tokens")
    by_token = shared * lists * C * (D + Dv) * size + q_bytes + o_bytes * (2 if backward else 1)
    by_chunk = kv_bytes + rows * D * size + rows * Dv * 8  # a row of q in, a float32 row of o read and added to
    if backward:
        by_chunk = kv_bytes * 2 + rows * (D + Dv) * size + rows * D * 8
    cache = by_chunk if schedule.dataflow in ("chunk", "fused") else by_token
    if two_pass:
        cache += kv_bytes * 2 + rows * (D + Dv) * size
    return Work(flops=2.0 * rows * C * products, memory_bytes=memory, cache_bytes=cache + pick_bytes)


def attention_passes(problem: Problem, schedule: Schedule, limits: Limits) -> list[Pass]:
    """The kernels of a schedule, in the order in which they run."""
    if schedule.dataflow == "chunk":
        return [_chunk_pass(problem, schedule, limits)]
    if schedule.dataflow == "fused":
        return [_fused_pass(problem, schedule, limits), _sort_pass(problem)]
    passes = [_token_pass(problem, schedule, limits)]
    if problem.op == "hsa_backward":
        passes.append(_second_pass(problem, schedule, limits))
    return passes


def _token_pass(problem: Problem, schedule: Schedule, limits: Limits) -> Pass:
    """Programs that own one token (`token`) or several neighbours (`union`) and read the chunks that they picked."""
    D, Dv, backward = problem.head_dim, problem.value_dim, problem.op == "hsa_backward"
    tokens = schedule.number("block_tokens") if schedule.dataflow == "union" else 1
    blocks = problem.batch * problem.num_kv_heads * math.ceil(problem.seq_len / tokens)
    # Each further token of a block brings some new chunks; the last block may have fewer tokens.
    new_tokens = problem.batch * problem.num_kv_heads * problem.seq_len - blocks
    chunks = problem.top_k * (1 + new_tokens / blocks * (1 - OVERLAP))
    rows = max(MIN_ROWS, tile_rows(problem, tokens))
    kv_bytes = problem.batch * problem.kv_len * problem.num_kv_heads * (D + Dv) * problem.itemsize
    read = blocks * chunks * problem.chunk_size * (D + Dv) * problem.itemsize
    own = problem.batch * problem.seq_len * problem.num_heads * (D + Dv * (2 if backward else 1)) * problem.itemsize
    return Pass(
        flops=2.0
        * blocks
        * chunks
        * rows
        * _padded(problem.chunk_size)
        * _products(problem, (2, 1) if backward else (1, 1)),
        cache_bytes=read + own,
        memory_bytes=own + kv_bytes + read * _missed(kv_bytes, limits),
        programs=blocks,
        launches=1,
        rows=rows,
        warps=schedule.number("num_warps"),
        stages=schedule.number("num_stages"),
    )


def _chunk_pass(problem: Problem, schedule: Schedule, limits: Limits) -> Pass:
    """Programs that own a chunk, or a segment of its list: the forward, or the whole backward."""
    D, Dv, backward = problem.head_dim, problem.value_dim, problem.op == "hsa_backward"
    shape = _Lists.of(problem, schedule, schedule.number("segment"), schedule.number("super_tile"))
    width = D if backward else Dv  # the width of a row that is added up over a token's picks
    reduction = schedule["reduce"]
    part_bytes = shape.rows * width * (2 if reduction == "slots16" else 4)
    row_bytes = shape.rows * (D + Dv if backward else D) * problem.itemsize
    kv_bytes = shape.segments * problem.chunk_size * (D + Dv) * problem.itemsize
    live = shape.live_tokens * problem.num_heads
    listed = (
        shape.rows / problem.group * (16 if backward else 12)
    )  # where entries lie, their weights, gradients of these
    memory = kv_bytes + row_bytes * _missed(live * D * problem.itemsize, limits)
    added = 3 * 4 / problem.itemsize if schedule["segment"] else 1.0 if not schedule["super_tile"] else 2.0
    if reduction == "atomic":
        traffic = 3 * part_bytes  # read, added to, written
        # A token's parts are added close to each other in time, so forward the cache holds more than chance says.
        memory += (2.0 if backward else _ADDED) * part_bytes * _missed(live * width * 4, limits)
    else:
        traffic = 2 * part_bytes + problem.batch * problem.seq_len * problem.num_heads * width * problem.itemsize
        memory += 2 * part_bytes * _missed(live * problem.top_k * width * 4, limits)
    return Pass(
        flops=2.0
        * shape.padded_rows
        * _padded(problem.chunk_size)
        * _products(problem, (3, 2) if backward else (1, 1)),
        cache_bytes=kv_bytes * (1 + added if backward else 1) + row_bytes + traffic + listed,
        memory_bytes=memory + problem.batch * problem.seq_len * problem.num_heads * (D + Dv) * problem.itemsize,
        programs=shape.segments / shape.launches,
        launches=shape.launches * (1 if reduction == "atomic" else 2) + _INDEX_LAUNCHES * (shape.launches - 1),
        rows=shape.tile,
        warps=schedule.number("num_warps"),
        stages=schedule.number("num_stages"),
    )


def _sort_pass(problem: Problem) -> Pass:
    """The kernels that sort the picks of all super-tiles, before the main one."""
    picks = problem.batch * problem.seq_len * problem.num_kv_heads * problem.top_k
    return Pass(
        flops=0.0,
        cache_bytes=0.0,
        memory_bytes=_SORTED_BYTES * picks,
        programs=picks,
        launches=7,
        rows=MIN_ROWS,
        warps=4,
        stages=1,
    )


def _fused_pass(problem: Problem, schedule: Schedule, limits: Limits) -> Pass:
    """Programs that own a chunk within one super-tile, all in one launch; what tokens share is read again soon."""
    D, Dv, size, backward = problem.head_dim, problem.value_dim, problem.itemsize, problem.op == "hsa_backward"
    super_tile, segment = schedule.number("super_tile"), schedule.number("segment")
    shape = _Lists.of(problem, schedule, segment, super_tile)
    live = min(super_tile, problem.seq_len) * problem.group  # rows of the super-tile of one kv head
    width = D if backward else Dv  # the row that is added up over a token's picks
    row_width = D + Dv if backward else D
    kv_bytes = shape.segments * problem.chunk_size * (D + Dv) * size
    head_bytes = problem.kv_len * (D + Dv) * size  # what all super-tiles of one kv head read again
    row_bytes = shape.rows * row_width * size
    tokens = problem.batch * problem.seq_len
    own = tokens * problem.num_heads * (row_width + width) * size
    listed = shape.rows / problem.group * (12 if backward else 8)  # entries, their weights, gradients of these
    memory = own + kv_bytes * _missed(head_bytes, limits) + row_bytes * _missed(live * row_width * size, limits)
    reduction = schedule["reduce"]
    if reduction == "atomic":
        traffic = 3 * 4 * shape.rows * width  # read, added to, written
        memory += traffic * _missed(live * width * 4, limits)
    else:
        traffic = 2 * shape.rows * width * size + tokens * problem.num_heads * width * size
        # Parts are written back even though nobody reads them again; a second kernel finds them in memory alone.
        late = 1.0 if reduction == "slots" else _missed(live * problem.top_k * width * size, limits)
        memory += shape.rows * width * size * (1 + late)
    window = schedule.number("window") or tokens
    rows = max(1, window // problem.seq_len)  # a window has so many
    windows = math.ceil(problem.batch / rows) * math.ceil(problem.seq_len / window)
    if backward:
        traffic += 3 * 4 * shape.segments * problem.chunk_size * (D + Dv)  # dk and dv are added to
    return Pass(
        flops=2.0
        * shape.padded_rows
        * _padded(problem.chunk_size)
        * _products(problem, (3, 2) if backward else (1, 1)),
        cache_bytes=kv_bytes + row_bytes + traffic + listed,
        memory_bytes=memory,
        programs=shape.segments / windows,
        launches=windows * (2 if reduction == "slots" else 1),
        rows=shape.tile,
        warps=schedule.number("num_warps"),
        stages=schedule.number("num_stages"),
    )


def _second_pass(problem: Problem, schedule: Schedule, limits: Limits) -> Pass:
    """dk and dv, chunk by chunk, after a first pass by tokens."""
    D, Dv = problem.head_dim, problem.value_dim
    shape = _Lists.of(problem, schedule, 0, 0)
    apart = schedule["dk_dv"] == "apart"
    row_bytes = shape.rows * (D + Dv) * problem.itemsize * (2 if apart else 1)
    kv_bytes = shape.segments * problem.chunk_size * (D + Dv) * problem.itemsize
    live = shape.live_tokens * problem.num_heads * (D + Dv) * problem.itemsize
    return Pass(
        flops=2.0 * shape.padded_rows * _padded(problem.chunk_size) * _products(problem, (3, 2) if apart else (2, 2)),
        cache_bytes=2 * kv_bytes + row_bytes,
        memory_bytes=2 * kv_bytes + row_bytes * _missed(live, limits),
        programs=shape.segments,
        launches=2 if apart else 1,
        rows=shape.tile,
        warps=schedule.number("chunk_warps"),
        stages=schedule.number("chunk_stages"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lists:
    """The chunks' lists of picks, cut into segments and tiles."""

    rows: float  # the rows of all lists: a pick is a row for each head of its group
    padded_rows: float  # the rows of all tiles
    segments: float  # programs, over all launches
    launches: int  # super-tiles
    live_tokens: int  # whose rows are in use at a time
    tile: int  # rows of one

    @staticmethod
    def of(problem: Problem, schedule: Schedule, segment: int, super_tile: int) -> "_Lists":
        launches = math.ceil(problem.seq_len / super_tile) if super_tile else 1
        picks = problem.batch * problem.seq_len * problem.num_kv_heads * problem.top_k
        num_lists = problem.batch * problem.num_kv_heads * max(1, problem.num_chunks) * launches
        length = picks / num_lists
        block_entries = (
            fused_step(problem, schedule) if schedule.dataflow == "fused" else schedule.number("block_entries")
        )
        tile = max(MIN_ROWS, tile_rows(problem, block_entries))
        segments = num_lists * (_pieces(length, segment) if segment else 1.0)
        # The last tile of a list is half full on average.
        tiles = picks / block_entries + segments / 2
        return _Lists(
            rows=picks * problem.group,
            padded_rows=tiles * tile,
            segments=segments,
            launches=launches,
            live_tokens=problem.batch * min(super_tile or problem.seq_len, problem.seq_len),
            tile=tile,
        )


@functools.cache
def _pieces(mean: float, segment: int) -> float:
    """Returns into how many pieces of at most `segment` entries a list is cut, on average over random lists.

    Picks that fall on chunks at random make lists of Poisson's lengths: some are empty, and some a piece longer.
    """
    reach = 6 * math.sqrt(mean) + 6
    lengths = range(max(1, math.floor(mean - reach)), math.ceil(mean + reach))
    return sum(
        math.ceil(length / segment) * math.exp(length * math.log(mean) - mean - math.lgamma(length + 1))
        for length in lengths
    )


def _products(problem: Problem, counts: tuple[int, int]) -> int:
    """Depth of so many products over the head dim and over the value dim, for each row and key."""
    return counts[0] * _padded(problem.head_dim) + counts[1] * _padded(problem.value_dim)


def _padded(size: int) -> int:
    return max(MIN_ROWS, next_power_of_2(size))


def _missed(live_bytes: float, limits: Limits) -> float:
    """Share of accesses to so many bytes, in no order, that the shared cache does not hold."""
    return max(0.0, 1 - limits.cache_mb * 1e6 / live_bytes) if live_bytes else 0.0
