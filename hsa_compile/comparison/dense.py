"""PyTorch's dense attention: its own choice on a CPU, each of its kernels by name on a GPU."""

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hsa_compile.comparison.case import Call, Case, dense_work
from hsa_compile.comparison.choices import BOTH, DECODE, FORWARD
from hsa_compile.comparison.contender import DENSE, Contender, available
from hsa_compile.comparison.gather import too_large
from hsa_compile.comparison.other_functions import check_other, pages_in_order

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def dense_contenders(device: torch.device) -> list[Contender]:
    """Causal attention to everything; what one runs who has no sparse attention."""
    if device.type == "cpu":
        return [_contender("SDPA", None)]
    return [_contender(f"SDPA {name}", name) for name in _BACKENDS]


def _contender(name: str, backend: str | None) -> Contender:
    return Contender(
        name=name,
        computes=DENSE,
        make=functools.partial(_make_dense, backend),
        check=check_other(DENSE),
        why_not=_scores_too_large if backend == "math" else available,
        kinds=(FORWARD, BOTH, DECODE),
        work=dense_work,
    )


def _make_dense(backend: str | None, case: Case) -> Call:
    """A call on tensors that lie as `[B, HQ, T, D]`; its results lie as ours do."""
    if case.kind == DECODE:
        inputs = case.decoding
        tensors = (inputs.q, *(pages_in_order(x, inputs.page_table) for x in (inputs.k_chunks, inputs.v_chunks)))
    else:
        tensors = (case.attention.q, case.attention.k, case.attention.v)
    q, k, v = (x.transpose(1, 2).contiguous() for x in tensors)
    if backend == "efficient":  # it knows no groups
        k, v = (x.repeat_interleave(case.problem.group, dim=1) for x in (k, v))
    causal = case.kind != DECODE  # a decoded token is the last one
    chosen: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    if backend is not None:
        chosen = functools.partial(sdpa_kernel, _BACKENDS[backend])

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with chosen():
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

    return call_of(forward, q, k, v, case)


def call_of(forward: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, case: Case) -> Call:
    """Of a function of q, k and v `[B, H, T, D]`: gives o, and dq where gradients are asked for, as `[B, T, HQ, D]`."""

    def without_gradients() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (forward(q, k, v).transpose(1, 2),)

    if case.kind != BOTH:
        return without_gradients
    leaves = [x.requires_grad_() for x in (q, k, v)]
    grad_o = case.attention.grad_o.transpose(1, 2).contiguous()

    def with_gradients() -> tuple[Tensor, ...]:
        o = forward(*leaves)
        dq, _, _ = torch.autograd.grad(o, leaves, grad_o)
        return (o.detach().transpose(1, 2), dq.transpose(1, 2))

    return with_gradients


def _scores_too_large(case: Case) -> str | None:
    problem = case.problem
    scores = problem.batch * problem.num_heads * problem.seq_len * problem.kv_len
    copies = 4 if case.kind == BOTH else 2
    return too_large("its score matrix", copies * scores * problem.itemsize, case.device)
