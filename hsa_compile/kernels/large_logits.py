"""The softmax of logits so large that float32 does not tell near ties apart, and its gradient, in float64."""

import torch
from torch import Tensor

# A float32 dot product is off by about 6e-8 of its size; if all logits are below this, softmax is right to 1e-5.
MAX_FLOAT32_LOGIT = 64.0


def too_large_for_float32(logits: Tensor) -> bool:
    """Returns whether any entry is beyond `MAX_FLOAT32_LOGIT`, or NaN, beside which others may be.

    It is for CPU tensors, where asking does not wait.
    """
    if logits.numel() == 0:
        return False
    low, high = torch.aminmax(logits)
    return not -MAX_FLOAT32_LOGIT <= low.item() <= high.item() <= MAX_FLOAT32_LOGIT


def precise_softmax(q: Tensor, k: Tensor, *, scale: float, chunk_size: int, extra_key: bool) -> Tensor:
    """Computes the softmax over each chunk on its own, from logits in float64.

    Args:
        q: `[…, R, D]`.
        k: `[…, M·C, D]`, the keys of M chunks.
        scale: factor of the logits.
        chunk_size: `C`.
        extra_key: whether there is one more key, of logit 0 (softmax-off-by-one), which is not returned.

    Returns:
        `[…, R, M·C]` float64.
    """
    logits = (scale * (q.double() @ k.double().mT)).unflatten(-1, (-1, chunk_size))  # […, R, M, C]
    if extra_key:
        logits = torch.cat([logits, torch.zeros_like(logits[..., :1])], dim=-1)
    return logits.softmax(dim=-1)[..., :chunk_size].flatten(-2)


def precise_softmax_gradient(p: Tensor, do: Tensor, v: Tensor, *, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Computes dP less its mean without cancellation, which the gradient of a nearly one-hot softmax depends on.

    Args:
        p: `[…, R, M·C]` float64, from `precise_softmax`.
        do: `[…, R, Dv]`.
        v: `[…, M·C, Dv]`.
        chunk_size: `C`.

    Returns:
        dP − d `[…, R, M·C]` and d `[…, R, M]`, the sum of P · dP over each chunk; float64.
    """
    dp = (do.double() @ v.double().mT).unflatten(-1, (-1, chunk_size))  # […, R, M, C]
    d = (p.unflatten(-1, (-1, chunk_size)) * dp).sum(dim=-1)
    return (dp - d.unsqueeze(-1)).flatten(-2), d
