"""The SwiGLU experts of a MoE, on tokens sorted by expert: one product a group, nothing padded, nothing dropped."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertOrder:
    """The pairs (token, chosen expert) of `chosen [T, K]`, sorted by expert; `P = T·K`, pair `p` is token `p // K`.

    Attributes:
        order: `[P]`, the pair at each place of the sorted list.
        inverse: `[T, K]`, the place of each pair in the sorted list.
        ends: `[E]` int32, where each expert's part of the list ends.
        counts: `[E]` int64, how many pairs each expert has.
    """

    order: Tensor
    inverse: Tensor
    ends: Tensor
    counts: Tensor


def sort_by_expert(chosen: Tensor, num_experts: int) -> ExpertOrder:
    """Sorts `chosen [T, K]` by expert, stably; there is no other sort, and nothing waits for the device."""
    experts, order = torch.sort(chosen.flatten(), stable=True)
    bounds = torch.searchsorted(experts, torch.arange(num_experts + 1, device=chosen.device))
    places = torch.arange(order.numel(), device=chosen.device)
    inverse = torch.empty_like(order).scatter_(0, order, places).view(chosen.shape)
    return ExpertOrder(order=order, inverse=inverse, ends=bounds[1:].to(torch.int32), counts=bounds.diff())


def grouped_swiglu(
    x: Tensor,
    weights: Tensor,
    pairs: ExpertOrder,
    gate_up: Tensor,
    down: Tensor,
    sliced: Callable[..., Tensor],
) -> Tensor:
    """Returns for each token the weighted sum of its experts' SwiGLU; all tensors but `pairs` have one dtype.

    Where `grouped_mm` runs (bfloat16 on CUDA, rows of whole 16 bytes), all experts are one launch. Elsewhere each
    expert's slice is one product, which needs the counts on the host.

    Args:
        x: `[T, dim]`.
        weights: `[T, K]`, the weights of the chosen experts.
        pairs: the chosen experts, sorted by `sort_by_expert`.
        gate_up: `[E, dim, 2 · expert_dim]`, gate first.
        down: `[E, expert_dim, dim]`.
        sliced: what computes it where `grouped_mm` does not run: `sliced`, or that as `torch.compile` leaves it alone.

    Returns:
        `[T, dim]`.
    """
    rows_of_16_bytes = x.shape[1] % 8 == 0 and down.shape[1] % 8 == 0
    if x.is_cuda and x.dtype == torch.bfloat16 and rows_of_16_bytes:
        return _Grouped.apply(x, weights, pairs.order, pairs.inverse, pairs.ends, gate_up, down)
    return sliced(x, weights, pairs, gate_up, down)


def sliced(x: Tensor, weights: Tensor, pairs: ExpertOrder, gate_up: Tensor, down: Tensor) -> Tensor:
    """Computes `grouped_swiglu` as one product an expert; it reads the counts, which differ by call, on the host."""
    bounds = [0, *pairs.ends.tolist()]
    slices = [(e, slice(start, end)) for e, (start, end) in enumerate(pairwise(bounds)) if end > start]
    return _Sliced.apply(x, weights, pairs.order, pairs.inverse, slices, gate_up, down)


def pair_by_pair(tokens: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Computes a few tokens on the CPU: the experts' weights are read where they are."""
    out = torch.zeros_like(tokens)
    scales = weights.tolist()
    for t, experts in enumerate(chosen.tolist()):
        for k, e in enumerate(experts):
            gate, up = (tokens[t : t + 1] @ gate_up[e]).chunk(2, dim=-1)
            out[t : t + 1].addmm_(F.silu(gate) * up, down[e], alpha=scales[t][k])
    return out


def count_in_backward(load: Tensor, out: Tensor, pairs: ExpertOrder) -> None:
    """Adds the pairs of each expert to the load when the gradient arrives.

    Activation checkpointing runs the forward pass twice but back-propagates through one of the two only, so this
    counts each token once with or without it; a forward pass that trains nothing is not counted.
    """

    def add(_: Tensor) -> None:
        load.add_(pairs.counts)

    out.register_hook(add)


def sum_pairs(rows: Tensor, inverse: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sums sorted `rows [P, dim]` to `[T, dim]`: gathered, weighted and added in one pass, always in the same order."""
    return F.embedding_bag(inverse, rows, mode="sum", per_sample_weights=weights)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _swiglu_backward(gate_up: Tensor, d_hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the pointwise part of the backward pass; `d_hidden` is overwritten.

    Args:
        gate_up: `[n, 2F]`, as the forward pass left it.
        d_hidden: `[n, F]`, gradient of the hidden rows for a weight of 1.
        weight: `[n, 1]`, the weight of each row.

    Returns:
        weighted hidden rows `[n, F]`, gradient of `gate_up`, gradient of `weight`.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    activated = F.silu(gate)
    hidden = activated * up
    d_weight = (d_hidden * hidden).sum(dim=-1, keepdim=True)
    d_hidden.mul_(weight)
    hidden.mul_(weight)
    d_gate_up = torch.empty_like(gate_up)
    d_gate, d_up = d_gate_up.chunk(2, dim=-1)
    torch.mul(d_hidden, activated, out=d_up)
    torch.ops.aten.silu_backward.grad_input(d_hidden.mul_(up), gate, grad_input=d_gate)
    return hidden, d_gate_up, d_weight


class _Sliced(torch.autograd.Function):
    """Computes expert by expert: a slice's rows stay in the CPU's cache from the gather to the last product."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        order: Tensor,
        inverse: Tensor,
        slices: list[tuple[int, slice]],
        w_gate_up: Tensor,
        w_down: Tensor,
    ) -> Tensor:
        token = order // weights.shape[1]
        gate_up = x.new_empty(order.numel(), w_gate_up.shape[2])
        rows = x.new_empty(order.numel(), x.shape[1])
        for e, part in slices:
            torch.mm(x.index_select(0, token[part]), w_gate_up[e], out=gate_up[part])
            torch.mm(_swiglu(gate_up[part]), w_down[e], out=rows[part])
        ctx.save_for_backward(x, weights, token, order, inverse, gate_up, w_gate_up, w_down)
        ctx.slices = slices
        return sum_pairs(rows, inverse, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, token, order, inverse, gate_up, w_gate_up, w_down = ctx.saved_tensors
        d_out = d_out.contiguous()
        weight = weights.flatten().index_select(0, order).unsqueeze(1)
        d_weight, d_rows = torch.empty_like(weight), x.new_empty(order.numel(), x.shape[1])
        # An expert without tokens keeps a gradient of zero.
        d_w_gate_up, d_w_down = torch.zeros_like(w_gate_up), torch.zeros_like(w_down)
        for e, part in ctx.slices:
            d_y = d_out.index_select(0, token[part])
            hidden, d_gate_up, d_weight[part] = _swiglu_backward(gate_up[part], d_y @ w_down[e].T, weight[part])
            torch.mm(hidden.T, d_y, out=d_w_down[e])
            torch.mm(x.index_select(0, token[part]).T, d_gate_up, out=d_w_gate_up[e])
            torch.mm(d_gate_up, w_gate_up[e].T, out=d_rows[part])
        d_weights = d_weight.flatten().index_select(0, inverse.flatten()).view(inverse.shape)
        return sum_pairs(d_rows, inverse), d_weights, None, None, None, d_w_gate_up, d_w_down


class _Grouped(torch.autograd.Function):
    """Computes all experts at once with `grouped_mm`: the same steps as `_Sliced`, without the host in between."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        order: Tensor,
        inverse: Tensor,
        ends: Tensor,
        w_gate_up: Tensor,
        w_down: Tensor,
    ) -> Tensor:
        token = order // weights.shape[1]
        gate_up = F.grouped_mm(x.index_select(0, token), w_gate_up, offs=ends)
        rows = F.grouped_mm(_swiglu(gate_up), w_down, offs=ends)
        ctx.save_for_backward(x, weights, token, order, inverse, ends, gate_up, w_gate_up, w_down)
        return sum_pairs(rows, inverse, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, token, order, inverse, ends, gate_up, w_gate_up, w_down = ctx.saved_tensors
        d_y = d_out.index_select(0, token)
        weight = weights.flatten().index_select(0, order).unsqueeze(1)
        d_hidden = F.grouped_mm(d_y, w_down.transpose(1, 2), offs=ends)
        hidden, d_gate_up, d_weight = _swiglu_backward(gate_up, d_hidden, weight)
        # The kernels of some devices leave the gradient of an empty group unwritten (pytorch issue 172439).
        empty = (ends.diff(prepend=ends.new_zeros(1)) == 0)[:, None, None]
        d_w_down = F.grouped_mm(hidden.T, d_y, offs=ends).masked_fill_(empty, 0)
        d_w_gate_up = F.grouped_mm(x.index_select(0, token).T, d_gate_up, offs=ends).masked_fill_(empty, 0)
        d_rows = F.grouped_mm(d_gate_up, w_gate_up.transpose(1, 2), offs=ends)
        d_weights = d_weight.flatten().index_select(0, inverse.flatten()).view(inverse.shape)
        return sum_pairs(d_rows, inverse), d_weights, None, None, None, d_w_gate_up, d_w_down
