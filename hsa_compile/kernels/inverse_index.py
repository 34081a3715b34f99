"""Which tokens picked a chunk: the lists that chunk-stationary kernels walk, built on the device.

The lists of all chunks of one (batch, kv head) lie one after the other in `entries`, and `offsets` says where each
begins (CSR). Linear in the number of picks, no dense mask, no synchronisation with the host, and deterministic.
"""

import torch
from torch import Tensor

INT16_MAX = torch.iinfo(torch.int16).max
INT32_MAX = torch.iinfo(torch.int32).max


def inverse_index(chunk_indices: Tensor, num_chunks: int) -> tuple[Tensor, Tensor]:
    """Sort the picks of each (batch, kv head) by chunk.

    Args:
        chunk_indices: `[B, T, H, K]` integers; what lies outside `0 … num_chunks − 1` is an empty slot.
        num_chunks: `N`.

    Returns:
        entries `[B·H, T·K]`, flat positions `t·K + slot` sorted by chunk, in rising order within a chunk, empty
        slots last. offsets `[B·H, N + 1]`: chunk `c` was picked by `entries[bh, offsets[bh, c] : offsets[bh, c + 1]]`.
        Both are int32 where `T·K` allows, else int64.
    """
    B, T, H, K = chunk_indices.shape
    picked = (chunk_indices >= 0) & (chunk_indices < num_chunks)
    chunk = torch.where(picked, chunk_indices, num_chunks)  # [B, T, H, K]
    # A radix sort costs a pass a byte: narrow keys halve it.
    key_dtype = torch.int16 if num_chunks <= INT16_MAX else torch.int32
    chunk = chunk.to(key_dtype).transpose(1, 2).reshape(B * H, T * K).contiguous()  # kernels address what comes of it
    ordered, entries = torch.sort(chunk, dim=1, stable=True)  # [B*H, T*K]
    fits = T * K <= INT32_MAX
    bounds = torch.arange(num_chunks + 1, dtype=key_dtype, device=chunk.device).expand(B * H, -1)
    offsets = torch.searchsorted(ordered, bounds.contiguous(), out_int32=fits)  # [B*H, N + 1]
    return (entries.to(torch.int32) if fits else entries), offsets


def list_addresses(entries: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Turn list entries into addresses, so that kernels need no division.

    Args:
        entries: `[B·H, T·K]`, from `inverse_index`.
        shape: the shape of the chunk indices, `(B, T, H, K)`.

    Returns:
        token_heads `[B·H, T·K]`, the entry's row of a `[B·T·H, …]` tensor, and picks `[B·H, T·K]`, its place in a
        flat `[B·T·H·K]` one; int32 where all places fit, else int64.
    """
    B, T, H, K = shape
    dtype = torch.int32 if B * T * H * K <= INT32_MAX else torch.int64
    first = torch.arange(B * H, device=entries.device, dtype=dtype)[:, None]  # [B*H, 1]
    first = first // H * (T * H) + first % H  # the row of the list's token 0
    entries = entries.to(dtype)
    token = torch.div(entries, max(K, 1), rounding_mode="floor")
    token_heads = first + token * H  # [B*H, T*K]
    return token_heads, token_heads * K + (entries - token * K)


def split_lists(offsets: Tensor, *, segment: int, num_entries: int) -> Tensor:
    """Cut each chunk's list into tiles of at most `segment` entries, so that a hot chunk feeds many programs.

    How many tiles there are is known only on the device; their number here is the most that there can be.

    Args:
        offsets: `[B·H, N + 1]`, from `inverse_index`.
        segment: the most entries of a tile.
        num_entries: `T·K`.

    Returns:
        tiles `[B·H, M, 3]`, (chunk, start, stop) with the bounds counted within `entries[bh]`; the superfluous
        ones come last with start = stop. `M = min(N, T·K) + T·K // segment`; of the dtype of `offsets`.
    """
    num_lists, num_chunks = offsets.shape[0], offsets.shape[1] - 1
    num_tiles = min(num_chunks, num_entries) + num_entries // segment
    if num_chunks == 0:
        return offsets.new_zeros(num_lists, 0, 3)
    begin, end = offsets[:, :-1].contiguous(), offsets[:, 1:]  # [B*H, N]
    tiles_each = (end - begin + segment - 1) // segment  # [B*H, N]
    last_tile = tiles_each.cumsum(1)  # [B*H, N], the number of tiles up to and with chunk c
    tile = torch.arange(num_tiles, device=offsets.device).expand(num_lists, -1).contiguous()  # [B*H, M]
    chunk = torch.searchsorted(last_tile, tile, right=True).clamp(max=num_chunks - 1)  # [B*H, M]
    first_tile = (last_tile - tiles_each).gather(1, chunk)
    stop = end.gather(1, chunk)
    start = torch.minimum(begin.gather(1, chunk) + (tile - first_tile) * segment, stop)
    tiles = torch.stack([chunk, start, torch.minimum(start + segment, stop)], dim=-1)  # [B*H, M, 3]
    return tiles.to(offsets.dtype)


def super_tile_lists(chunk_indices: Tensor, num_chunks: int, *, super_tile: int, segment: int) -> tuple[Tensor, Tensor]:
    """Sort the picks of each (batch, kv head) by super-tile of tokens, then by chunk, and cut them into tiles.

    Args:
        chunk_indices: `[B, T, H, K]` integers; what lies outside `0 … num_chunks − 1` is an empty slot.
        num_chunks: `N`.
        super_tile: tokens of a super-tile; the last one may hold fewer.
        segment: the most entries of a tile.

    Returns:
        entries `[B·H, T·K]`, flat positions `t·K + slot`, empty slots last; and tiles `[B·H, M, 3]`, (chunk, start,
        stop) as `split_lists` returns them, super-tile by super-tile.
    """
    _, T, _, K = chunk_indices.shape
    num_super_tiles = -(-T // super_tile)
    token = torch.arange(T, dtype=torch.int32, device=chunk_indices.device)
    first = torch.div(token, super_tile, rounding_mode="floor") * num_chunks  # [T]
    picked = (chunk_indices >= 0) & (chunk_indices < num_chunks)
    # Each super-tile has its own numbers for the chunks.
    chunk = torch.where(picked, chunk_indices + first.view(1, T, 1, 1), -1)
    entries, offsets = inverse_index(chunk, num_super_tiles * num_chunks)
    tiles = split_lists(offsets, segment=segment, num_entries=T * K)
    tiles[..., 0].remainder_(max(num_chunks, 1))
    return entries, tiles


def block_visits(chunk_indices: Tensor, num_chunks: int, *, block_m: int) -> tuple[Tensor, Tensor, Tensor]:
    """The union of the chunks that each block of neighbouring tokens picked, as a list of visits.

    A visit is one chunk and the tokens that picked it, each of them once: a token that picked it again begins another
    visit of the same chunk. Linear in the number of picks, deterministic, no synchronisation.

    Args:
        chunk_indices: `[B, T, H, K]` integers; what lies outside `0 … num_chunks − 1` is an empty slot.
        num_chunks: `N`.
        block_m: `M`, tokens of a block, at most 32; the last block of a sequence may hold fewer.

    Returns:
        visits `[B·H·blocks, M·K, 3]`, (chunk, start, tokens), in rising order of chunks. Bit i of `tokens` says that
        token i picked the chunk, and in which slot each of them did stands in `slots` from `start` on, in the order of
        the tokens. Superfluous visits come last, without a token. slots `[B·H·blocks, M·K]`, sorted by chunk; those
        of empty slots come last. num_visits `[B·H·blocks]`. All int32.
    """
    B, T, H, K = chunk_indices.shape
    num_blocks, picks = -(-T // block_m), block_m * K
    picked = (chunk_indices >= 0) & (chunk_indices < num_chunks)
    key_dtype = torch.int16 if num_chunks <= INT16_MAX else torch.int32
    chunk = torch.where(picked, chunk_indices, num_chunks).to(key_dtype).transpose(1, 2)  # [B, H, T, K]
    chunk = torch.nn.functional.pad(chunk, (0, 0, 0, num_blocks * block_m - T), value=num_chunks)
    ordered, entries = torch.sort(
        chunk.reshape(B * H * num_blocks, picks).contiguous(), dim=1, stable=True
    )  # [B*H*blocks, M*K]

    token = entries // max(1, K)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    same_chunk, same_token = (x[:, 1:] == x[:, :-1] for x in (ordered, token))
    begins[:, 1:] = ~same_chunk | same_token
    listed = ordered < num_chunks
    begins &= listed
    visit = (begins.cumsum(dim=1) - 1).clamp_min(0)
    visits = torch.zeros(*ordered.shape, 3, dtype=torch.int64, device=chunk.device)
    position = torch.arange(picks, device=chunk.device).expand_as(visit)
    for field, values in enumerate((ordered.long(), position)):  # those of its first pick
        visits[..., field].scatter_add_(1, visit, torch.where(begins, values, 0))
    visits[..., 2].scatter_add_(1, visit, torch.where(listed, torch.ones_like(token) << token, 0))
    slots = (entries % max(1, K)).to(torch.int32)
    return visits.to(torch.int32), slots, begins.sum(dim=1, dtype=torch.int32)


def chunk_lists(
    chunk_indices: Tensor, num_chunks: int, tile_tokens: int
) -> tuple[Tensor, Tensor, list[tuple[int, int, int]]]:
    """Sorts the picks of one super-tile by chunk.

    Args:
        chunk_indices: `[n, K]` integers on the CPU; what lies outside `0 … num_chunks − 1` is an empty slot.
        num_chunks: `N`.
        tile_tokens: longer lists are cut into pieces of this many tokens.

    Returns:
        tokens `[n·K]` int64, the token of each pick, sorted by chunk; slots `[n·K]` int64, the pick's flat
        position `token·K + slot`; and `(chunk, start, end)` ranges of those two, one a tile, in order.
    """
    num_slots = chunk_indices.shape[1]
    entries, offsets = inverse_index(chunk_indices[None, :, None], num_chunks)
    slots = entries[0].long()
    tokens = slots.div(num_slots, rounding_mode="floor")
    bounds = offsets[0].tolist()
    tiles = [
        (chunk, start, min(start + tile_tokens, bounds[chunk + 1]))
        for chunk in range(num_chunks)
        for start in range(bounds[chunk], bounds[chunk + 1], tile_tokens)
    ]
    return tokens, slots, tiles
