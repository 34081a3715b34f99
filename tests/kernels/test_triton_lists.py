"""The lists that emitted Triton kernels walk, against loops in Python."""

import pytest
import torch

from hsa_compile.kernels.hsa_attention import pick_lists
from hsa_compile.kernels.hsa_attention.pick_lists import lists_of_chunks, visits_of_blocks
from hsa_compile.kernels.inverse_index import (
    block_visits,
    inverse_index,
    list_addresses,
    split_lists,
    super_tile_lists,
)


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


@pytest.mark.parametrize("block_m", [1, 4, 32])
def test_visits_serve_every_pick_of_a_block_once(block_m: int) -> None:
    B, T, H, K = 2, 13, 3, 5
    indices = torch.randint(-1, 4, (B, T, H, K), generator=torch.Generator().manual_seed(0))
    visits, slots, num_visits = block_visits(indices, 3, block_m=block_m)
    num_blocks = -(-T // block_m)
    assert visits.shape == (B * H * num_blocks, block_m * K, 3)
    for program, (rows, order, count) in enumerate(zip(visits.tolist(), slots.tolist(), num_visits, strict=True)):
        bh, block = divmod(program, num_blocks)
        picks = indices[bh // H, block * block_m : (block + 1) * block_m, bh % H].tolist()
        served = []
        for chunk, start, tokens in rows[:count]:
            pickers = [token for token in range(block_m) if tokens >> token & 1]
            served += [(token, order[start + i], chunk) for i, token in enumerate(pickers)]
        all_picks = [(t, i, chunk) for t, row in enumerate(picks) for i, chunk in enumerate(row) if 0 <= chunk < 3]
        assert sorted(served) == all_picks
        assert not any(tokens for _, _, tokens in rows[count:])


def test_more_lists_than_a_grid_has_rows_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in ("_sorting", "_spreading", "_cutting", "_visiting"):
        monkeypatch.setattr(pick_lists, kernel, None)
    indices = torch.randint(-1, 3, (4096, 1, 16, 2), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    entries, offsets = inverse_index(indices, 3)
    expected = (*list_addresses(entries, indices.shape), offsets)
    for ours, theirs in (
        (lists_of_chunks(indices, 3), expected),
        (visits_of_blocks(indices, 3, block_m=4), block_visits(indices, 3, block_m=4)),
        (
            pick_lists.lists_by_super_tile(indices, 3, super_tile=64, segment=16),
            super_tile_lists(indices, 3, super_tile=64, segment=16),
        ),
    ):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("num_chunks", [0, 1, 6, 1500, 5000, 40000])
@pytest.mark.parametrize("segment", [None, 2])
def test_lists_built_by_triton_are_those_of_pytorch(num_chunks: int, segment: int | None) -> None:
    # Six programs sort 256 tokens each; their counts are kept for each, for two together, or for all.
    B, T, H, K = 1, 1371, 2, 3
    indices = torch.randint(-1, 7, (B, T, H, K), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    token_heads, picks, lists = lists_of_chunks(indices, num_chunks, segment=segment)
    entries, offsets = inverse_index(indices, num_chunks)
    addresses = list_addresses(entries, indices.shape)
    for bh, filled in enumerate(offsets[:, -1].tolist()):
        assert torch.equal(token_heads[bh, :filled], addresses[0][bh, :filled])
        assert torch.equal(picks[bh, :filled], addresses[1][bh, :filled])
    if segment is None:
        assert torch.equal(lists, offsets)
        return
    tiles = split_lists(offsets, segment=segment, num_entries=T * K)
    assert lists.shape == tiles.shape
    for one, other in zip(lists.tolist(), tiles.tolist(), strict=True):
        assert [row for row in one if row[1] < row[2]] == [row for row in other if row[1] < row[2]]
        assert all(row[1] == row[2] for row in one[len([row for row in other if row[1] < row[2]]) :])


@pytest.mark.parametrize(("block_m", "K"), [(1, 5), (4, 5), (32, 3), (2, 1), (8, 400)])
def test_visits_built_by_triton_are_those_of_pytorch(block_m: int, K: int) -> None:
    B, T, H = 2, 13, 3
    indices = torch.randint(-1, 4, (B, T, H, K), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    ours, theirs = (build(indices, 3, block_m=block_m) for build in (visits_of_blocks, block_visits))
    assert torch.equal(ours[2], theirs[2])
    for one, other, count in zip(ours[0].tolist(), theirs[0].tolist(), theirs[2].tolist(), strict=True):
        assert one[:count] == other[:count]
    for one, other, visits, count in zip(ours[1].tolist(), theirs[1].tolist(), *theirs[::2], strict=True):
        _, start, tokens = visits[count - 1].tolist() if count else (0, 0, 0)
        filled = start + (tokens & 0xFFFFFFFF).bit_count()
        assert one[:filled] == other[:filled]
