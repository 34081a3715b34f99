"""Lists of picks that Triton kernels walk, built by Triton kernels: the fewest launches, and none waits for the host.

`inverse_index` says what the lists are and builds the same with PyTorch's operators, where there are more chunks or
picks than these kernels count. They stand here, and not in emitted modules, so that Triton compiles them once for all
schedules: sorting in registers takes seconds to compile. Only emitted Triton modules import this.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# A kernel's arguments have no types that Python knows.

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hsa_compile.kernels.inverse_index import (
    INT32_MAX,
    block_visits,
    inverse_index,
    list_addresses,
    split_lists,
    super_tile_lists,
)
from hsa_compile.kernels.launch import quick

MOST_SORTED = 1024  # picks that one warp sorts by chunk
MOST_VISITED = 2048  # picks that one program sorts into visits
MOST_COUNTED = 16384  # chunks whose picks are counted; with more, PyTorch sorts
MOST_LISTS = 65535  # pairs of (batch, kv head), the second axis of a grid; with more, PyTorch sorts
CUT_CHUNKS = 1024  # chunks of one step that cuts their picks into tiles
SUM_BLOCK = {"ROWS": 32, "CHUNKS": 64}  # blocks and chunks of one step that sums counts
SORT_OPTIONS = {"num_stages": 1}
SUM_OPTIONS = SPREAD_OPTIONS = VISIT_OPTIONS = {"num_warps": 4, "num_stages": 1}
CUT_OPTIONS = {"num_warps": 8, "num_stages": 1}


@triton.jit
def _larger(one, other):
    return tl.maximum(one, other)


@triton.jit
def _run_starts(begins, i, AXIS: tl.constexpr):
    """Where the run of equal chunks begins that each place ``i`` belongs to."""
    return tl.associative_scan(tl.where(begins, i, 0), AXIS, _larger)


@triton.jit
def _begins(chunk, i, AXIS: tl.constexpr):
    """Whether a run of equal chunks begins at each place."""
    return (i == 0) | (chunk != tl.gather(chunk, tl.maximum(i - 1, 0), AXIS))


@triton.jit
def _load_picks(chunk_indices, token, i, inside, bh, T, H, N, K: tl.constexpr):
    """The chunk of each pick, N for an empty slot: slot ``i % K`` of a token."""
    first_token_head = (bh // H).to(tl.int64) * T * H + bh % H  # row of [B, T, H]
    place = (first_token_head + token.to(tl.int64) * H) * K + i % K
    chunk = tl.load(chunk_indices + place, mask=inside & (token < T), other=-1)
    return tl.where((chunk >= 0) & (chunk < N), chunk, N).to(tl.int32)


@triton.jit
def _neighbours_in_threads(key, PICKS: tl.constexpr, WARPS: tl.constexpr):
    """The keys in another order, so that a thread holds PICKS / (32 WARPS) neighbours: they are sorted in registers."""
    EACH: tl.constexpr = PICKS // (WARPS * 128)
    if EACH > 1:
        key = tl.reshape(tl.permute(tl.reshape(key, [EACH, WARPS, 32, 4]), (1, 2, 0, 3)), [PICKS])
    return key


@triton.jit
def _begins_in(row, key, i, PICKS: tl.constexpr):
    """Whether a run of equal chunks begins at each of the sorted keys of a row in memory."""
    return (i == 0) | (key // PICKS != tl.load(row + i - 1, mask=i > 0, other=0) // PICKS)


@triton.jit
def _ends_in(row, key, i, PICKS: tl.constexpr):
    """Whether a run of equal chunks ends at each of the sorted keys of a row in memory."""
    return (i == PICKS - 1) | (key // PICKS != tl.load(row + i + 1, mask=i < PICKS - 1, other=0) // PICKS)


@triton.jit(do_not_specialize=("T", "H", "N", "rows"))
def _sort_picks(
    chunk_indices, ordered, counts, T, H, N, rows,
    K: tl.constexpr, TOKENS: tl.constexpr, PICKS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Sort a row, the picks of TOKENS tokens, by chunk, stably, and count those of each chunk in blocks of ``rows``."""
    row, bh = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, PICKS)
    chunk = _load_picks(chunk_indices, row * TOKENS + i // K, i, i < TOKENS * K, bh, T, H, N, K)
    # The place of a pick stands in the low bits: no two keys are equal, and the order is stable.
    key = tl.sort(_neighbours_in_threads(chunk * PICKS + i, PICKS, WARPS))
    ordered += (bh.to(tl.int64) * tl.num_programs(0) + row) * PICKS
    tl.store(ordered + i, key)
    tl.debug_barrier()  # before other threads read it
    key = tl.load(ordered + i)
    chunk = key // PICKS
    counts += (bh.to(tl.int64) * (tl.num_programs(0) // rows) + row // rows) * N
    count = i - _run_starts(_begins_in(ordered, key, i, PICKS), i, 0) + 1
    ends = _ends_in(ordered, key, i, PICKS)
    tl.atomic_add(counts + chunk, count, mask=ends & (chunk < N), sem="relaxed")


@triton.jit(do_not_specialize=("N", "blocks"))
def _sum_blocks(counts, totals, N, blocks, ROWS: tl.constexpr, CHUNKS: tl.constexpr):
    """Put in place of the counts of each block those of all earlier blocks of its super-tile, and write the totals."""
    super_tile = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)
    total = tl.zeros([CHUNKS], tl.int32)
    for first in range(0, blocks, ROWS):
        block = first + tl.arange(0, ROWS)[:, None]
        place = counts + (super_tile * blocks + block) * N + chunk[None, :]
        there = (block < blocks) & (chunk < N)[None, :]
        count = tl.load(place, mask=there, other=0)
        tl.store(place, total[None, :] + tl.cumsum(count, 0) - count, mask=there)
        total += tl.sum(count, 0)
    tl.store(totals + super_tile * N + chunk, total, mask=chunk < N)


@triton.jit(do_not_specialize=("T", "H", "N", "rows", "blocks"))
def _spread_picks(
    ordered, earlier, until, entries, picks, T, H, N, rows, blocks,
    K: tl.constexpr, TOKENS: tl.constexpr, PICKS: tl.constexpr, ADDRESSES: tl.constexpr,
):  # fmt: skip
    """Move the sorted picks of a block to their places among those of the whole super-tile, or of all tokens.

    They are written as entries, token * K + slot; or as addresses, the rows of [B, T, H] and the picks themselves.
    """
    block, bh = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, PICKS)
    super_tile = bh.to(tl.int64) * (tl.num_programs(0) // blocks) + block // blocks
    earlier += (bh.to(tl.int64) * tl.num_programs(0) + block) * N
    until += super_tile * N
    ordered += (bh.to(tl.int64) * tl.num_programs(0) + block) * rows * PICKS
    first = bh.to(tl.int64) * T * K if ADDRESSES else super_tile * blocks * rows * (TOKENS * K)
    entries += first
    picks += first
    for row in range(rows):
        key = tl.load(ordered + i)
        begins = _begins_in(ordered, key, i, PICKS)
        chunk, entry = key // PICKS, (block * rows + row) * (TOKENS * K) + key % PICKS
        listed = chunk < N
        # A pick comes after those of all earlier chunks, those of its chunk in earlier rows, and those before it here.
        place = i - _run_starts(begins, i, 0) + tl.load(earlier + chunk, mask=listed, other=0)
        position = place + tl.load(until + chunk - 1, mask=listed & (chunk > 0), other=0)
        if ADDRESSES:
            token_head = (bh // H) * T * H + bh % H + entry // K * H
            tl.store(entries + position, token_head, mask=listed)
            tl.store(picks + position, token_head * K + entry % K, mask=listed)
        else:
            tl.store(entries + position, entry, mask=listed)
        if row + 1 < rows:
            tl.debug_barrier()  # all have read the old counts; then all see the new ones
            tl.store(earlier + chunk, place + 1, mask=listed & _ends_in(ordered, key, i, PICKS))
            tl.debug_barrier()
        ordered += PICKS


@triton.jit(do_not_specialize=("N", "num_tiles", "num_picks"))
def _cut_tiles(until, tiles, N, num_tiles, num_picks, SEGMENT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Cut the picks of each chunk in one super-tile into tiles of SEGMENT at most; tiles too many are empty."""
    s, bh = tl.program_id(0), tl.program_id(1)
    super_tile = bh.to(tl.int64) * tl.num_programs(0) + s
    until += super_tile * N
    tiles += super_tile * num_tiles * 3
    total = 0
    for first in range(0, N, BLOCK_N):
        chunk = first + tl.arange(0, BLOCK_N)
        start = tl.load(until + chunk - 1, mask=(chunk < N) & (chunk > 0), other=0)
        stop = tl.load(until + chunk, mask=chunk < N, other=0)
        tiles_each = (stop - start + SEGMENT - 1) // SEGMENT
        tile = total + tl.cumsum(tiles_each, 0) - tiles_each
        for i in range(tl.max(tiles_each, 0)):
            mine = i < tiles_each
            row = tiles + (tile + i) * 3
            tl.store(row, chunk, mask=mine)
            tl.store(row + 1, s * num_picks + start + i * SEGMENT, mask=mine)
            tl.store(row + 2, s * num_picks + tl.minimum(start + (i + 1) * SEGMENT, stop), mask=mine)
        total += tl.sum(tiles_each, 0)
    for first in range(total, num_tiles, BLOCK_N):
        left = first + tl.arange(0, BLOCK_N)
        for field in tl.static_range(3):
            tl.store(tiles + left * 3 + field, tl.zeros_like(left), mask=left < num_tiles)


@triton.jit(do_not_specialize=("T", "H", "N", "num_blocks"))
def _list_visits(
    chunk_indices, visits, slots, num_visits, T, H, N, num_blocks,
    K: tl.constexpr, BLOCK_M: tl.constexpr, PICKS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The visits of BLOCKS blocks of tokens, as `block_visits` lists them; what lies past the last is not written."""
    bh = tl.program_id(1)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    i = tl.arange(0, PICKS)[None, :] + tl.zeros([BLOCKS, 1], tl.int32)
    chunk = _load_picks(chunk_indices, block * BLOCK_M + i // K, i, i < BLOCK_M * K, bh, T, H, N, K)
    key = tl.sort(chunk * PICKS + i)
    chunk = key // PICKS
    token = key % PICKS // K
    listed = (chunk < N) & (block < num_blocks)
    # A token that picked the chunk once more begins another visit, as a new chunk does.
    begins = _begins(chunk, i, 1) | (_begins(chunk * BLOCK_M + token, i, 1) == 0)
    ends = (i == PICKS - 1) | (tl.gather(begins.to(tl.int32), tl.minimum(i + 1, PICKS - 1), 1) != 0)
    start = _run_starts(begins, i, 1)
    bit = tl.where(listed, 1 << (token % 32), 0)
    until = tl.cumsum(bit, 1)  # wraps around; the difference of two is right nevertheless
    tokens = until - tl.gather(until - bit, start, 1)
    begins = begins & listed
    program = bh.to(tl.int64) * num_blocks + block
    visit = visits + (program * (BLOCK_M * K) + tl.cumsum(begins.to(tl.int32), 1) - 1) * 3
    tl.store(visit, chunk, mask=ends & listed)
    tl.store(visit + 1, start, mask=ends & listed)
    tl.store(visit + 2, tokens, mask=ends & listed)
    tl.store(slots + program * (BLOCK_M * K) + i, key % PICKS % K, mask=listed)
    tl.store(num_visits + program, tl.sum(begins.to(tl.int32), 1)[:, None], mask=block < num_blocks)


_sorting, _summing, _spreading, _cutting, _visiting = map(
    quick, (_sort_picks, _sum_blocks, _spread_picks, _cut_tiles, _list_visits)
)


def lists_by_super_tile(
    chunk_indices: Tensor, num_chunks: int, *, super_tile: int, segment: int
) -> tuple[Tensor, Tensor]:
    """Sorts picks by super-tile of tokens, then by chunk.

    Args:
        chunk_indices: `[B, T, H, K]` integers; what lies outside `0 … num_chunks − 1` is an empty slot.
        num_chunks: `N`.
        super_tile: the tokens of a super-tile, a power of two.
        segment: the most entries of a tile.

    Returns:
        entries `[B·H, …]`, `t·K + slot`, and the tiles `[B·H, M, 3]` that they are cut into, (chunk, start, stop);
        superfluous ones have start = stop.
    """
    if num_chunks > MOST_COUNTED or chunk_indices.shape[0] * chunk_indices.shape[2] > MOST_LISTS:
        return super_tile_lists(chunk_indices, num_chunks, super_tile=super_tile, segment=segment)
    with torch.cuda.device_of(chunk_indices):
        entries, _, until = _sort(chunk_indices, num_chunks, super_tile)
        return entries, _cut(until, super_tile * chunk_indices.shape[3], segment)


def lists_of_chunks(
    chunk_indices: Tensor, num_chunks: int, *, segment: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts picks by chunk.

    Args:
        chunk_indices: `[B, T, H, K]` integers; what lies outside `0 … num_chunks − 1` is an empty slot.
        num_chunks: `N`.
        segment: the most entries of a tile; None for whole lists.

    Returns:
        token_heads and picks `[B·H, T·K]`, as `list_addresses` returns them; and tiles as `split_lists` does, or
        without a segment the offsets `[B·H, N + 1]` of `inverse_index`.
    """
    B, T, H, K = chunk_indices.shape
    if not (0 < num_chunks <= MOST_COUNTED and 0 < chunk_indices.numel() <= INT32_MAX and B * H <= MOST_LISTS):
        listed, offsets = inverse_index(chunk_indices, num_chunks)
        addresses = list_addresses(listed, chunk_indices.shape)
        return *addresses, offsets if segment is None else split_lists(offsets, segment=segment, num_entries=T * K)
    with torch.cuda.device_of(chunk_indices):
        token_heads, picks, until = _sort(chunk_indices, num_chunks, None)
        if segment is None:
            return token_heads, picks, torch.nn.functional.pad(until[:, 0], (1, 0))
        return token_heads, picks, _cut(until, T * K, segment)


def visits_of_blocks(chunk_indices: Tensor, num_chunks: int, *, block_m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what `block_visits` does, in one launch; superfluous visits hold anything."""
    B, T, H, K = chunk_indices.shape
    picks = _power_of_2(block_m * K)
    if not 0 < picks <= MOST_VISITED or num_chunks * picks > INT32_MAX or B * H > MOST_LISTS:
        return block_visits(chunk_indices, num_chunks, block_m=block_m)
    num_blocks, blocks = -(-T // block_m), MOST_VISITED // picks
    options: Any = {"dtype": torch.int32, "device": chunk_indices.device}
    visits = torch.empty(B * H * num_blocks, block_m * K, 3, **options)
    slots = torch.empty(B * H * num_blocks, block_m * K, **options)
    num_visits = torch.empty(B * H * num_blocks, **options)
    sizes, block = (T, H, num_chunks, num_blocks), (K, block_m, picks, blocks)
    with torch.cuda.device_of(chunk_indices):
        _visiting[(-(-num_blocks // blocks), B * H)](
            chunk_indices, visits, slots, num_visits, *sizes, *block, **VISIT_OPTIONS
        )
    return visits, slots, num_visits


def _sort_block(top_k: int, super_tile: int | None) -> dict[str, int]:
    """Returns the constants of a row: a power of two of tokens, whose picks one program sorts."""
    tokens = min(super_tile or MOST_SORTED, 1 << (max(1, MOST_SORTED // top_k).bit_length() - 1))
    return {"K": top_k, "TOKENS": tokens, "PICKS": _power_of_2(tokens * top_k)}


def _sort_warps(picks: int) -> int:
    """Returns how many warps sort so many picks; one has registers for 1,024."""
    return min(8, max(1, picks // 1024))


def _power_of_2(number: int) -> int:
    """Returns the least power of two that is no less, or 0 for 0; Triton's own takes longer than a launch's grid."""
    return 1 << (number - 1).bit_length() if number else 0


def _sort(chunk_indices: Tensor, num_chunks: int, super_tile: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns entries, or without super-tiles addresses, and how many picks come before the end of each chunk.

    The latter is [B·H, super-tiles, N] and counts within a super-tile.
    """
    B, T, H, K = chunk_indices.shape
    block = _sort_block(K, super_tile)
    tokens, num_super_tiles = block["TOKENS"], -(-T // (super_tile or T))
    rows_each = -(-(super_tile or T) // tokens)  # rows of a super-tile
    # So many rows are counted together that there are no more counts than picks, where a super-tile has so many rows.
    rows = min(_power_of_2(-(-num_chunks // block["PICKS"])), _power_of_2(rows_each))
    blocks = -(-rows_each // rows)
    num_blocks = num_super_tiles * blocks
    options: Any = {"dtype": torch.int32, "device": chunk_indices.device}
    ordered = torch.empty(B * H, num_blocks * rows, block["PICKS"], **options)
    entries = torch.empty(B * H, T * K if super_tile is None else num_blocks * rows * tokens * K, **options)
    picks = torch.empty_like(entries) if super_tile is None else entries
    counts = torch.zeros(B * H, num_blocks, num_chunks, **options)
    totals = torch.empty(B * H, num_super_tiles, num_chunks, **options)
    sizes, warps = (T, H, num_chunks, rows), _sort_warps(block["PICKS"])
    _sorting[(num_blocks * rows, B * H)](
        chunk_indices, ordered, counts, *sizes, *block.values(), warps, num_warps=warps, **SORT_OPTIONS
    )
    columns = -(-num_chunks // SUM_BLOCK["CHUNKS"])
    _summing[(B * H * num_super_tiles, columns)](counts, totals, num_chunks, blocks, *SUM_BLOCK.values(), **SUM_OPTIONS)
    until = totals.cumsum(2, dtype=torch.int32)
    _spreading[(num_blocks, B * H)](
        ordered, counts, until, entries, picks, *sizes, blocks, *block.values(), super_tile is None, **SPREAD_OPTIONS
    )
    return entries, picks, until


def _cut(until: Tensor, num_picks: int, segment: int) -> Tensor:
    """Returns the tiles [B·H, M, 3] of all super-tiles from what `_sort` says of their chunks."""
    num_lists, num_super_tiles, num_chunks = until.shape
    num_tiles = min(num_chunks, num_picks) + num_picks // segment  # the most that a super-tile can have
    tiles = until.new_empty(num_lists, num_super_tiles * num_tiles, 3)
    sizes = (num_chunks, num_tiles, num_picks, segment, CUT_CHUNKS)
    _cutting[(num_super_tiles, num_lists)](until, tiles, *sizes, **CUT_OPTIONS)
    return tiles


def windows(batch: int, seq_len: int, tokens: int) -> Iterator[tuple[slice, slice]]:
    """Yields the rows and the tokens of each window: so many tokens of one row, or whole rows with no more in all."""
    rows = max(1, tokens // seq_len)
    for row in range(0, batch, rows):
        for first in range(0, seq_len, tokens):
            yield slice(row, row + rows), slice(first, first + tokens)


def sort_launches(top_k: int, *, super_tile: int | None = None, segment: int | None = None) -> tuple[dict, ...]:
    """Returns what an emitted module says of the kernels behind `lists_by_super_tile` or `lists_of_chunks`."""
    block = _sort_block(top_k, super_tile)
    warps = _sort_warps(block["PICKS"])
    sizes = dict.fromkeys(("T", "H", "N", "rows"), "i32")
    launches = [
        _launch(
            _sort_picks, ("chunk_indices", "ordered", "counts"), sizes, {**block, "WARPS": warps},
            {"num_warps": warps, **SORT_OPTIONS},
        ),
        _launch(_sum_blocks, ("counts", "totals"), dict.fromkeys(("N", "blocks"), "i32"), SUM_BLOCK, SUM_OPTIONS),
        _launch(
            _spread_picks, ("ordered", "earlier", "until", "entries", "picks"), sizes | {"blocks": "i32"},
            {**block, "ADDRESSES": super_tile is None}, SPREAD_OPTIONS,
        ),
    ]  # fmt: skip
    if segment is not None:
        sizes = dict.fromkeys(("N", "num_tiles", "num_picks"), "i32")
        block = {"SEGMENT": segment, "BLOCK_N": CUT_CHUNKS}
        launches.append(_launch(_cut_tiles, ("until", "tiles"), sizes, block, CUT_OPTIONS))
    return tuple(launches)


def visit_launches(top_k: int, block_m: int) -> tuple[dict, ...]:
    """Returns what an emitted module says of the kernel behind `visits_of_blocks`."""
    picks = _power_of_2(block_m * top_k)
    if not 0 < picks <= MOST_VISITED:
        return ()
    tensors = ("chunk_indices", "visits", "slots", "num_visits")
    block = {"K": top_k, "BLOCK_M": block_m, "PICKS": picks, "BLOCKS": MOST_VISITED // picks}
    sizes = dict.fromkeys(("T", "H", "N", "num_blocks"), "i32")
    return (_launch(_list_visits, tensors, sizes, block, VISIT_OPTIONS),)


def _launch(kernel: Any, tensors: tuple[str, ...], sizes: dict[str, str], block: dict[str, int], options: Any) -> dict:
    signature = dict.fromkeys(tensors, "*i32") | sizes | dict.fromkeys(block, "constexpr")
    return {"kernel": kernel, "signature": signature, "constants": block, **options}
