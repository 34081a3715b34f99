"""The scan of Mamba-2: state space duality, chunk by chunk, in plain PyTorch (arXiv 2405.21060, listing 1)."""

from itertools import pairwise

import torch
from torch import Tensor

# Pairs of tokens, over all rows and heads, whose decays are in memory at once; on the CPU they stay in its cache.
PAIRS_PER_PASS = 2**26
PAIRS_PER_PASS_CPU = 2**18


def ssd_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk_length: int
) -> tuple[Tensor, Tensor]:
    """`h_t = exp(dt_t · A) h_{t-1} + dt_t x_t ⊗ B_t`, `y_t = h_t C_t`, in time and memory linear in T.

    Ours: decays inside a chunk are differences of float64 sums. The listing sums each pair's steps instead, to the
    same end: where a large step is followed by small ones, differences in float32 lose the small ones.

    Args:
        x: `[B, T, heads, head_dim]`.
        dt: `[B, T, heads]`, step sizes ≥ 0; a token with 0 leaves the state as it is.
        A: `[heads]`, negative.
        B, C: `[B, T, state_dim]`, shared by all heads.
        state: `[B, heads, head_dim, state_dim]` before the first token.
        chunk_length: tokens that are computed pair by pair; beyond them the state carries.

    Returns:
        y `[B, T, heads, head_dim]`, the state after the last token.
    """
    num_tokens = x.shape[1]
    pairs_per_pass = PAIRS_PER_PASS_CPU if x.device.type == "cpu" else PAIRS_PER_PASS
    chunks_per_pass = pairs_per_pass // (x.shape[0] * x.shape[2] * chunk_length**2) or 1
    whole = num_tokens - num_tokens % chunk_length
    starts = [*range(0, whole, chunks_per_pass * chunk_length), whole]
    passes = [(slice(*bounds), chunk_length) for bounds in pairwise(starts)]
    if whole < num_tokens:
        passes.append((slice(whole, num_tokens), num_tokens - whole))
    outputs = []
    for part, length in passes:
        y, state = _scan_chunks(x[:, part], dt[:, part], A, B[:, part], C[:, part], state, length)
        outputs.append(y)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), state


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`ssd_scan` for one token; shapes as there, without T."""
    state = state * (dt * A).exp()[..., None, None] + (x * dt.unsqueeze(-1)).unsqueeze(-1) * B[:, None, None]
    return (state @ C[:, None, :, None]).squeeze(-1), state


def _scan_chunks(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    batch, num_tokens, heads, head_dim = x.shape
    chunks = (batch, num_tokens // length, length)  # b, c, l
    B, C = B.reshape(*chunks, -1), C.reshape(*chunks, -1)
    steps = (x * dt.unsqueeze(-1)).reshape(*chunks, heads, head_dim)
    log_decay = (dt.double() * A.double()).reshape(*chunks, heads).cumsum(dim=2)  # from the chunk's start
    from_start = log_decay.to(x.dtype).exp().unsqueeze(-1)  # [b, c, l, heads, 1]
    to_end = (log_decay[:, :, -1:] - log_decay).to(x.dtype).exp().unsqueeze(-1)

    # Pairs inside a chunk.
    pairs = (C @ B.mT).unsqueeze(2) * _pair_decay(log_decay, x.dtype)  # [b, c, heads, l, l]
    y = (pairs @ steps.transpose(2, 3)).transpose(2, 3)

    # What each chunk adds to the state, the states between chunks, and what they add to the outputs.
    added = (steps * to_end).flatten(3).mT @ B  # [b, c, heads · head_dim, n]
    added = added.unflatten(2, (heads, head_dim))
    before, state = _pass_states(added, from_start[:, :, -1].unsqueeze(-1), state)
    y = y + (C @ before.flatten(2, 3).mT).unflatten(3, (heads, head_dim)) * from_start
    return y.reshape(x.shape), state


def _pair_decay(log_decay: Tensor, dtype: torch.dtype) -> Tensor:
    """`log_decay [b, c, l, heads]` → `[b, c, heads, l, l]`, decay from each token to each later one of its chunk."""
    log_decay = log_decay.transpose(2, 3)
    length = log_decay.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool, device=log_decay.device).triu(1)
    between = (log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)).to(dtype)
    # Masked before the exponential: after it, infinity times zero would poison the gradient.
    return between.masked_fill(later, -torch.inf).exp()


def _pass_states(added: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Runs over chunks.

    Args:
        added: `[b, c, heads, head_dim, n]` by each chunk.
        decay: `[b, c, heads, 1, 1]` over each chunk.
        state: `[b, heads, head_dim, n]` before the first.

    Returns:
        the state before each chunk, shaped as `added`, and the one after the last.
    """
    before = []
    for add, keep in zip(added.unbind(1), decay.unbind(1), strict=True):
        before.append(state)
        state = torch.addcmul(add, state, keep)
    return torch.stack(before, dim=1), state
