"""flash-linear-attention's native sparse attention on the same picks: one softmax over a token's chunks together."""

import importlib
import importlib.util

import torch
from torch import Tensor

from hsa_compile.comparison.case import Call, Case
from hsa_compile.comparison.choices import BOTH, FORWARD
from hsa_compile.comparison.contender import SPARSE, Contender
from hsa_compile.comparison.other_functions import check_other

_LEAST_GROUP = 16


def nsa_contenders() -> list[Contender]:
    """The selected branch of `fla.ops.nsa`, where it is installed."""
    return [
        Contender(
            name="fla NSA",
            computes=SPARSE,
            make=_make_nsa,
            check=check_other(SPARSE),
            why_not=_why_not_nsa,
            kinds=(FORWARD, BOTH),
        )
    ]


def _make_nsa(case: Case) -> Call:
    nsa = importlib.import_module("fla.ops.nsa")
    inputs, problem = case.attention, case.problem
    indices = inputs.chunk_indices.long()

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nsa.parallel_nsa(
            q, k, v, block_indices=indices, block_counts=problem.top_k, block_size=problem.chunk_size
        )

    def without_gradients() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (forward(inputs.q, inputs.k, inputs.v),)

    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]

    def with_gradients() -> tuple[Tensor, ...]:
        o = forward(*leaves)
        dq, _, _ = torch.autograd.grad(o, leaves, inputs.grad_o)
        return (o.detach(), dq)

    return with_gradients if case.kind == BOTH else without_gradients


def _why_not_nsa(case: Case) -> str | None:
    if case.device.type != "cuda":
        return "its kernels need a GPU"
    if importlib.util.find_spec("fla") is None:
        return "not installed: pip install flash-linear-attention"
    group = case.problem.group
    if group < _LEAST_GROUP or group & (group - 1):
        return f"it needs a group that is a power of two from {_LEAST_GROUP} on, not {group}"
    return None
