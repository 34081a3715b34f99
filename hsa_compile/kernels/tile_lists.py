"""The work of one super-tile on the host: which tokens picked which chunk, cut into tiles."""

from torch import Tensor

from hsa_compile.kernels.inverse_index import inverse_index


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
