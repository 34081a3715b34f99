"""hsa_attention on a CPU against dense causal attention and against gathering each token's chunks."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hsa_compile import Problem, hsa_attention
from hsa_compile.comparison.same_function import gather_attention
from hsa_compile.kernels.hsa_attention.inputs import make_inputs


@dataclass(frozen=True)
class Case:
    """A problem's tensors with what is to be computed from them."""

    problem: Problem
    leaves: tuple[Tensor, ...]
    chunk_indices: Tensor
    grad_o: Tensor

    def ours(self) -> Tensor:
        q, k, v, weights = self.leaves
        return hsa_attention(q, k, v, self.chunk_indices, weights, chunk_size=self.problem.chunk_size)

    def dense(self) -> Tensor:
        q, k, v, _ = (x.transpose(1, 2) for x in self.leaves)
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    def gather(self) -> Tensor:
        q, k, v, weights = self.leaves
        return gather_attention(q, k, v, self.chunk_indices, weights, chunk_size=self.problem.chunk_size)

    def with_gradients(self, forward: Callable[[], Tensor], *, weights: bool) -> Callable[[], object]:
        leaves = self.leaves if weights else self.leaves[:3]
        return lambda: torch.autograd.grad(forward(), leaves, self.grad_o)


@pytest.fixture(params=[1, 16], ids=["G16", "G1"])
def case(request, tuned) -> Case:
    problem = Problem(
        seq_len=16384, num_heads=16, num_kv_heads=request.param, head_dim=64, chunk_size=64, top_k=8, dtype="float32"
    )
    tuned(problem)
    inputs = make_inputs(problem, torch.device("cpu"))
    leaves = tuple(x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.chunk_weights))
    return Case(problem=problem, leaves=leaves, chunk_indices=inputs.chunk_indices, grad_o=inputs.grad_o)


def test_forward(case: Case, race) -> None:
    with torch.no_grad():
        contenders = {"hsa_attention": case.ours, "dense causal SDPA": case.dense}
        if case.problem.group == 16:  # at G = 1 gathering moves sixteen times as much, and takes over a minute
            contenders["gather per token"] = case.gather
        wanted = {16: {"dense causal SDPA": 20, "gather per token": 2}, 1: {"dense causal SDPA": 10}}
        race(contenders, 5, wanted[case.problem.group])


def test_forward_and_backward(case: Case, race) -> None:
    contenders = {
        "hsa_attention": case.with_gradients(case.ours, weights=True),
        "dense causal SDPA": case.with_gradients(case.dense, weights=False),
    }
    if case.problem.group == 16:
        contenders["gather per token"] = case.with_gradients(case.gather, weights=True)
    wanted = {"dense causal SDPA": 12, "gather per token": 2} if case.problem.group == 16 else {}
    race(contenders, 3, wanted)


@pytest.mark.parametrize("case", [1], ids=["G16"], indirect=True)
def test_share_of_matmul_rate(case: Case, race, capsys) -> None:
    """Achieved GFLOP/s beside those of a large product in the same run; at least 30 % are wanted."""
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    problem = case.problem
    with torch.no_grad():
        ratio = race({"hsa_attention": case.ours, "matmul 2048": lambda: left @ right}, 9, {})["matmul 2048"]
    flops = 4 * problem.seq_len * problem.num_heads * problem.top_k * problem.chunk_size * problem.head_dim
    with capsys.disabled():
        print(f"  rate of hsa_attention over that of matmul: {flops / (2 * 2048**3) * ratio:.0%} (goal 30%)")
