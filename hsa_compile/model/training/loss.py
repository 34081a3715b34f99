"""Cross entropy with a weight for each token, whose logits exist for a few tokens at a time only."""

from typing import Any

import torch
from torch import Tensor


def weighted_cross_entropy(
    hidden: Tensor, output_weight: Tensor, targets: Tensor, weights: Tensor, *, chunk: int
) -> tuple[Tensor, Tensor]:
    """Σ weights · cross entropy, with the gradients made in the forward pass, chunk by chunk.

    At no time do logits of more than `chunk` tokens exist, and they are computed once: memory beyond inputs and their
    gradients is 2 · chunk · V.

    Args:
        hidden: `[N, dim]`, the output of the last layer.
        output_weight: `[V, dim]`.
        targets: `[N]` int64, the tokens to predict.
        weights: `[N]` float32, not differentiated.
        chunk: tokens at a time.

    Returns:
        the sum, a float32 scalar at least, differentiable in hidden and output_weight; and the cross entropy of each
        token `[N]` without gradient.
    """
    total, losses = _WeightedCrossEntropy.apply(hidden, output_weight, targets, weights, chunk)
    return total, losses


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, output_weight: Tensor, targets: Tensor, weights: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        weight_grad = torch.zeros_like(output_weight, dtype=dtype) if needs_weight else None
        for part in _parts(hidden.shape[0], chunk):
            h = hidden[part]
            logits = (h @ output_weight.T).to(dtype)
            normalizer = logits.logsumexp(dim=-1, keepdim=True)
            picked = targets[part, None]
            losses[part] = (normalizer - logits.gather(1, picked)).squeeze(1)
            if hidden_grad is None and weight_grad is None:
                continue
            scale = weights[part, None].to(dtype)
            grad = logits.sub_(normalizer).exp_().mul_(scale)
            grad.scatter_add_(1, picked, -scale)
            grad = grad.to(h.dtype)
            if hidden_grad is not None:
                hidden_grad[part] = (grad @ output_weight.to(h.dtype)).to(h.dtype)
            if weight_grad is not None:
                weight_grad += (grad.T @ h).to(dtype)
        grads = [grad for grad in (hidden_grad, weight_grad) if grad is not None]
        ctx.save_for_backward(*grads)
        ctx.weight_dtype = output_weight.dtype
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = grads[0]
        saved = list(ctx.saved_tensors)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden_grad = saved.pop(0) if needs_hidden else None
        weight_grad = saved.pop(0) if needs_weight else None
        return (
            None if hidden_grad is None else hidden_grad * scale.to(hidden_grad.dtype),
            None if weight_grad is None else (weight_grad * scale).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def _parts(length: int, chunk: int) -> list[slice]:
    return [slice(begin, begin + chunk) for begin in range(0, length, chunk)]
