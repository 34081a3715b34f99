"""A mixture of SwiGLU experts: a sigmoid router picks the top k, a shared expert is added, a bias balances the load.

The layer is that of Ling-2.0 and DeepSeek-V3; balancing without a loss is that of arXiv 2408.15664.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.layers.basic import SwiGLU, kernel_dtype, no_autocast
from hsa_compile.model.layers.exchange import LocalExperts
from hsa_compile.model.layers.grouped_product import (
    count_in_backward,
    grouped_swiglu,
    pair_by_pair,
    sliced,
    sort_by_expert,
    sum_pairs,
)

FEW_PAIRS = 8  # Up to so many pairs, which is a step of decoding, sorting costs more than it saves.


class MoE(nn.Module):
    """Replaces the MLP of a layer: each token passes `experts_per_token` of the experts and the shared one.

    The balancing bias decides only which experts are chosen; their weights are the scores without it, normalised to
    the sum 1. Router and bias work in float32 at least, whatever the dtype of the model.

    Args:
        dim: width of the input and of the output.
        num_experts: `E`, how many experts there are.
        experts_per_token: `K`, how many of them a token passes.
        expert_dim: inner width of one expert.
        num_shared_experts: how many shared experts there are, computed as one SwiGLU; 0 for none.

    Raises:
        InvalidArgument: a size is below 1, or `experts_per_token` is above `num_experts`.
    """

    balance_bias: Tensor  # [E], float32
    load: Tensor  # [E], int64: pairs since the last `update_bias`

    def __init__(
        self,
        dim: int,
        *,
        num_experts: int,
        experts_per_token: int,
        expert_dim: int,
        num_shared_experts: int = 1,
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("num_experts", num_experts), ("expert_dim", expert_dim)):
            if size < 1:
                raise InvalidArgument(f"{name} is {size}; it must be at least 1")
        if not 1 <= experts_per_token <= num_experts:
            raise InvalidArgument(f"experts_per_token is {experts_per_token}; allowed are 1 to {num_experts}")
        if num_shared_experts < 0:
            raise InvalidArgument(f"num_shared_experts is {num_shared_experts}; it must be at least 0")
        self.num_experts = num_experts
        self.experts_per_token = experts_per_token
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(num_experts, dim, 2 * expert_dim))
        self.down = nn.Parameter(torch.empty(num_experts, expert_dim, dim))
        self.shared = SwiGLU(dim, num_shared_experts * expert_dim) if num_shared_experts else None
        self.register_buffer("balance_bias", torch.zeros(num_experts, dtype=torch.float32))
        self.register_buffer("load", torch.zeros(num_experts, dtype=torch.int64), persistent=False)
        self.local: LocalExperts | None = None
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draws all weights anew from a normal distribution; bias and load become zero."""
        for weight in self.parameters():
            nn.init.normal_(weight, std=std)
        self.balance_bias.zero_()
        self.load.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Runs `x [..., dim]` through the experts; the shape stays."""
        tokens = x.reshape(-1, x.shape[-1])
        chosen, weights = self._route(tokens)
        if self.local is not None:
            return self._travel(self.local, x, chosen, weights)
        out = self._experts(tokens, chosen, weights).view(x.shape)
        return out if self.shared is None else out + self.shared(x)

    def share_experts(self, mesh: DeviceMesh) -> LocalExperts:
        """Keeps this process's share of the experts, and returns it; `forward` sends tokens to them from then on.

        Args:
            mesh: the processes that share the experts, in one dimension.

        Raises:
            InvalidArgument: their number does not divide the number of experts.
        """
        if self.num_experts % mesh.size():
            raise InvalidArgument(
                f"train.expert_parallel = {mesh.size()} must divide model.num_experts = {self.num_experts}"
            )
        self.local = LocalExperts(self.gate_up, self.down, mesh)
        del self.gate_up, self.down
        return self.local

    def _travel(self, local: LocalExperts, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        dtype = kernel_dtype(x)
        pairs = sort_by_expert(chosen, self.num_experts)
        dispatched = local.dispatch(x.reshape(-1, x.shape[-1]).to(dtype), pairs, self.experts_per_token)
        shared = self.shared(x) if self.shared is not None else None  # while the tokens are on their way
        with no_autocast(x.device):
            out = sum_pairs(local(dispatched), pairs.inverse, weights.to(dtype)).view(x.shape)
        if self.training and out.requires_grad:
            count_in_backward(self.load, out, pairs)
        return out if shared is None else out + shared

    def _route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Returns for `tokens [T, dim]` the chosen experts and their weights, both `[T, K]`."""
        with no_autocast(tokens.device):
            dtype = torch.promote_types(tokens.dtype, torch.float32)
            logits = F.linear(tokens.to(dtype), self.router.weight.to(dtype))
            scores = logits.detach().sigmoid()
            chosen = (scores + self.balance_bias).topk(self.experts_per_token, dim=-1).indices
            # Scores over their sum, by their logarithms: a score of a logit below -104 is 0 in float32.
            return chosen, F.logsigmoid(logits.gather(1, chosen)).softmax(dim=-1)

    def _experts(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        # Small products of halves are slow on a CPU: a step of `tiny` takes 0.79 s with them and 0.56 s in float32.
        dtype = kernel_dtype(tokens)
        tokens, weights = tokens.to(dtype), weights.to(dtype)
        gate_up, down = self.gate_up.to(dtype), self.down.to(dtype)
        few, product, count = pair_by_pair, sliced, count_in_backward
        if "torch._dynamo" in sys.modules:
            from hsa_compile.model.layers import uncompiled

            few, product, count = uncompiled.pair_by_pair, uncompiled.sliced, uncompiled.count_in_backward
        with no_autocast(tokens.device):
            # Shapes without values cannot be sorted; gathered weights also show the right number of FLOPs.
            if tokens.is_meta or (chosen.numel() <= FEW_PAIRS and not torch.is_grad_enabled()):
                few = few if tokens.device.type == "cpu" else _gathered
                return few(tokens, chosen, weights, gate_up, down)
            pairs = sort_by_expert(chosen, self.num_experts)
            out = grouped_swiglu(tokens, weights, pairs, gate_up, down, product)
        if self.training and out.requires_grad:
            count(self.load, out, pairs)
        return out

    @property
    def max_over_mean_load(self) -> float:
        """The busiest expert's load over the mean since the last `update_bias`, on this process; 1 if nothing ran."""
        total = int(self.load.sum())
        return int(self.load.max()) * self.num_experts / total if total else 1.0

    @torch.no_grad()
    def update_bias(self, rate: float) -> None:
        """Moves each bias by `rate` against its expert's load and forgets the load; call it once an optimizer step.

        In a distributed run the load is the sum over all processes, so the biases stay equal.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.load)
        load = self.load.to(torch.float64)
        self.balance_bias += rate * torch.sign(load.mean() - load).to(torch.float32)
        self.load.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Keeps the bias in float32 when the model is cast: in bfloat16 its steps would be rounded away."""
        bias = self.balance_bias
        super()._apply(fn, recurse)
        if self.balance_bias.dtype != torch.float32:
            self.balance_bias = bias.to(self.balance_bias.device)
        return self


def saved_name(name: str) -> str:
    """Returns the name under which a weight is saved, whether a process holds all experts of its layer or a share."""
    return name.replace(".mlp.local.", ".mlp.")


def moe_reference(moe: MoE, x: Tensor) -> Tensor:
    """Computes what `moe` computes, as a loop over its experts; for tests, in any dtype.

    Args:
        moe: the layer whose weights are used.
        x: `[..., dim]`.

    Returns:
        `[..., dim]`.
    """
    tokens = x.reshape(-1, x.shape[-1])
    logits = tokens @ moe.router.weight.T
    chosen = torch.topk(torch.sigmoid(logits) + moe.balance_bias, moe.experts_per_token, dim=-1).indices
    log_scores = torch.full_like(logits, -torch.inf).scatter(1, chosen, F.logsigmoid(logits.gather(1, chosen)))
    weights = log_scores.softmax(dim=-1)  # [T, E]
    out = torch.zeros_like(tokens)
    for e in range(moe.num_experts):
        gate, up = (tokens @ moe.gate_up[e]).chunk(2, dim=-1)
        out = out + weights[:, e, None] * ((F.silu(gate) * up) @ moe.down[e])
    out = out.view(x.shape)
    return out if moe.shared is None else out + moe.shared(x)


def _gathered(tokens: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Computes a few tokens on a device with one batched product a weight, without a sort or a wait for the host."""
    rows = tokens.repeat_interleave(chosen.shape[1], dim=0).unsqueeze(1)  # [P, 1, dim]
    experts = chosen.flatten()
    gate, up = torch.bmm(rows, gate_up.index_select(0, experts)).chunk(2, dim=-1)
    pairs = torch.bmm(F.silu(gate) * up, down.index_select(0, experts))
    return torch.bmm(weights.unsqueeze(1), pairs.view(*chosen.shape, -1)).squeeze(1)
