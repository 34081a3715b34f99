"""Gumbel noise from a counter: a pure function of seed, batch, head, position and chunk, alike on every device.

Each (batch, token, head) gets a 32-bit key here; kernels hash it with the chunk's number, `mix(key ^ chunk · φ)`,
keep 23 bits as u in (0, 1) and take −log(−log u). All integer arithmetic is modulo 2³².
"""

import torch
from torch import Tensor

GOLDEN = -1640531527  # 2³² / φ as a signed number: neighbouring chunks differ in many bits
_FIRST, _SECOND = 0x7FEB352D, -2073254261  # the factors of "lowbias32"; the second is 0x846CA68B as a signed number
MAX_SEED = 2**64 - 1


def noise_keys(seed: int, batch: int, num_heads: int, positions: Tensor) -> Tensor:
    """Makes one key for each query row.

    Args:
        seed: the seed of the noise, 0 … `MAX_SEED`.
        batch: `B`.
        num_heads: `H`.
        positions: `[T]` int64, the absolute positions of the rows; only their lowest 32 bits count.

    Returns:
        `[B, T, H]` int32 on the device of `positions`.
    """
    device = positions.device
    low, high = (torch.tensor(part, device=device) for part in (seed & 0xFFFFFFFF, seed >> 32))
    key = mix(_int32(low) ^ mix(_int32(high) ^ GOLDEN))
    key = mix(key ^ _counted(torch.arange(batch, device=device)))  # [B]
    key = mix(key[:, None] ^ _counted(torch.arange(num_heads, device=device)))  # [B, H]
    return mix(key[:, None, :] ^ _counted(positions)[None, :, None])  # [B, T, H]


def gumbel(keys: Tensor, chunks: Tensor) -> Tensor:
    """Returns the noise that each key's row has for each chunk, in float32; the shapes broadcast."""
    bits = mix(keys ^ _counted(chunks))
    u = ((bits >> 9) & 0x7FFFFF).to(torch.float32).add_(0.5).mul_(2.0**-23)
    return u.log_().neg_().log_().neg_()


def mix(x: Tensor) -> Tensor:
    """Maps int32 one to one so that every input bit reaches every output bit ("lowbias32" of C. Wellons)."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _FIRST
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _SECOND
    return x ^ ((x >> 16) & 0xFFFF)


def _counted(numbers: Tensor) -> Tensor:
    return _int32(numbers) * GOLDEN


def _int32(numbers: Tensor) -> Tensor:
    """Returns the lowest 32 bits, as int32."""
    wide = numbers.to(torch.int64) & 0xFFFFFFFF
    return (wide - ((wide >> 31) << 32)).to(torch.int32)
