"""`select_chunks` as users call it: it checks its arguments, then PyTorch's dispatcher finds kernel and gradient."""

import torch
from torch import Tensor

from hsa_compile.checks import check_choice, check_count, check_flag, shown
from hsa_compile.errors import InvalidArgument
from hsa_compile.kernels.gumbel import MAX_SEED
from hsa_compile.kernels.hsa_attention.dispatch import are_checked_below
from hsa_compile.kernels.select_chunks import dispatch as select_ops
from hsa_compile.problem import FUSIONS, LANDMARKS_PER_CHUNK, MAX_CHUNK_SIZE, MAX_SELECTED


def select_chunks(
    query: Tensor,
    landmarks: Tensor,
    *,
    chunk_size: int,
    top_k: int,
    offset: int = 0,
    fusion: str = "softmax",
    noise_seed: int | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Selects the chunks that each token attends to, and their weights, as `hsa_attention` takes them.

    A chunk's score is `query · landmark / √Dr`, the largest of these if it has several landmarks. Row `t` stands at
    position `p = offset + t` and sees chunk `i` iff it is complete, `p ≥ (i + 1)·C`. The K visible chunks of the
    highest scores are picked; if scores are equal, the lower chunk wins. A chunk whose score is −∞ is never picked, as
    if it were not visible. Scores are compared in float32 (float64 for float64 inputs). Weights come from the scores of
    the picks: their softmax, or stick-breaking from the most recent chunk on, `w_i = σ(s_i) · Π (1 − σ(s_j))` over the
    more recent picks `j`.

    The weights are differentiable in query and landmarks: K landmarks a token, of each chunk the one that scored
    highest, the first of equals. Forward and backward need memory linear in T and N; query, landmarks and the numbers
    of these K are saved for backward. Beyond inputs, outputs and gradients they allocate at most: a key `[B, T, H]`
    int32 where there is noise, and on a GPU `[B, T, H, K]` score gradients in float32 with the inverse index, three
    int32 arrays of that size, or, for the split schedule, one `[splits, B, T, H, K]` array of int64.

    Args:
        query: `[B, T, H, Dr]`, float32, bfloat16 or float16; float64 on a CPU; `Dr` is at most 1024.
        landmarks: `[B, N, H, Dr]`, dtype and device of query; one for each chunk, or `[B, N, R, H, Dr]`: `R` of them,
            where `R` is 1, 2, 4, 8 or 16. `N` may be 0.
        chunk_size: `C`, keys in a chunk.
        top_k: `K`, at most 128; it may exceed `N`.
        offset: the position of the first query row: 0 in training, the number of earlier tokens in decoding.
        fusion: how scores become weights: `softmax` or `stick_breaking`.
        noise_seed: a seed 0 … 2⁶⁴ − 1 adds standard Gumbel noise to the scores for the comparison; None adds none.
            The noise depends on seed, batch, head, position and chunk alone: another schedule, device or split of the
            sequence draws the same.
        deterministic: allows only schedules that give the same bits in every run, gradients included.

    Returns:
        chunk_indices `[B, T, H, K]` int32, most recent chunk first, −1 in the tail where fewer than K can be picked;
        chunk_weights `[B, T, H, K]` float32 (float64 for float64 inputs), 0 in that tail.

    Raises:
        InvalidArgument: a shape, dtype, device or value is not allowed; the message shows it and what is allowed.

    Source: arXiv 2504.16795 (stick-breaking), arXiv 2511.23319 (softmax, Gumbel noise).
    """
    landmarks_per_chunk = 1
    if isinstance(landmarks, Tensor) and landmarks.dim() == 5:
        landmarks_per_chunk = landmarks.shape[2]
        check_choice("landmarks a chunk, landmarks.shape[2]", landmarks_per_chunk, LANDMARKS_PER_CHUNK)
        landmarks = landmarks.flatten(1, 2)
    if not are_checked_below(query, landmarks):
        select_ops.check_arguments(query, landmarks)
    _check_options(chunk_size, top_k, offset, fusion, noise_seed)
    check_flag("deterministic", deterministic)
    if query.numel() == 0 or landmarks.numel() == 0 or offset + query.shape[1] <= chunk_size:
        select_ops.check_arguments(query, landmarks)
        return _nothing_to_select(query, landmarks, top_k)
    if noise_seed is not None and noise_seed >= 2**63:
        noise_seed -= 2**64  # PyTorch's integers have a sign; the bits are the same
    chunk_weights, landmark_indices = select_ops.select_chunks(
        query, landmarks, landmarks_per_chunk, chunk_size, top_k, offset, fusion, noise_seed, deterministic
    )
    if landmarks_per_chunk == 1:
        return landmark_indices, chunk_weights
    return landmark_indices >> (landmarks_per_chunk.bit_length() - 1), chunk_weights  # a power of two; −1 stays −1


def _nothing_to_select(query: Tensor, landmarks: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Returns empty slots whose zero weights still belong to the graph."""
    shape = (*query.shape[:3], top_k)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    weights = torch.zeros(shape, dtype=dtype, device=query.device)
    weights = weights + 0 * (query[:0].sum() + landmarks[:0].sum()).to(dtype)
    return torch.full(shape, -1, dtype=torch.int32, device=query.device), weights


def _check_options(chunk_size: int, top_k: int, offset: int, fusion: str, noise_seed: int | None) -> None:
    check_count("chunk_size", chunk_size, 1, MAX_CHUNK_SIZE)
    check_count("top_k", top_k, 1, MAX_SELECTED)
    check_count("offset", offset, 0, select_ops.MAX_OFFSET)
    if noise_seed is not None and (type(noise_seed) is not int or not 0 <= noise_seed <= MAX_SEED):
        raise InvalidArgument(
            f"noise_seed = {shown(noise_seed)} must be an integer in 0 … {MAX_SEED}, or None for no noise"
        )
    check_choice("fusion", fusion, FUSIONS)
