"""What only a GPU can show. Its kernels are compiled there, so Triton must not interpret them:

TRITON_INTERPRET=0 pytest -m gpu -n 0
"""

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hsa_compile import Problem, SearchSpace, Target, hsa_attention, hsa_decode
from hsa_compile.autotune.options import TuneOptions
from hsa_compile.autotune.tune import tune
from hsa_compile.kernels.compare import TOLERANCES, relative_error
from hsa_compile.kernels.compile import compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.kernels.hsa_attention.inputs import make_inputs
from hsa_compile.kernels.hsa_attention.reference import hsa_attention_reference
from hsa_compile.kernels.ops import check, inputs_of
from hsa_compile.problem import ALL_OPS

DEVICE = torch.device("cuda")
PROBLEM = Problem(seq_len=501, kv_len=528, num_heads=8, num_kv_heads=2, head_dim=64, chunk_size=16, top_k=5)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(os.environ["TRITON_INTERPRET"] == "1", reason="needs TRITON_INTERPRET=0"),
    pytest.mark.filterwarnings("ignore::hsa_compile.errors.HSACompileWarning"),  # nothing is tuned here
]


def of_op(op: str, dtype: str) -> Problem:
    """A small problem of an op."""
    one_head = {"num_heads": 2, "num_kv_heads": 2} if op.startswith("select") else {}
    return replace(PROBLEM, op=op, dtype=dtype, seq_len=3 if op == "hsa_decode" else 501, **one_head)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("op", ALL_OPS)
def test_the_default_kernel_agrees_with_the_reference(op: str, dtype: str) -> None:
    problem, target = of_op(op, dtype), Target.of(DEVICE)
    kernel = compile_kernel(emit(problem, SearchSpace.of(problem, target).default(), target))
    check(kernel, problem, inputs_of(problem, DEVICE))


def attend(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """The output of the public function, and the gradients of its inputs for one of ones."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v, weights)]
    o = hsa_attention(*leaves[:3], indices, leaves[3], chunk_size=PROBLEM.chunk_size)
    return o.detach(), *torch.autograd.grad(o.sum(), leaves)


def test_the_public_function_agrees_with_the_reference_at_every_alignment() -> None:
    """Each launch after the first finds the kernel that fits its addresses, as a slice of a longer row shifts them."""
    inputs = make_inputs(replace(PROBLEM, dtype="float16"), DEVICE)
    picks = (inputs.chunk_indices, inputs.chunk_weights)
    wide = [x.double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.chunk_weights)]
    expected = hsa_attention_reference(*wide[:3], inputs.chunk_indices, wide[3], chunk_size=PROBLEM.chunk_size)
    gradients = torch.autograd.grad(expected.sum(), wide)
    for shift in (0, 1, 0, 8):
        room = torch.empty(inputs.q.numel() + shift, dtype=inputs.q.dtype, device=DEVICE)
        q = room[shift:].view_as(inputs.q).copy_(inputs.q)
        for got, right in zip(attend(q, inputs.k, inputs.v, *picks), (expected, *gradients), strict=True):
            assert relative_error(got, right.detach()) < TOLERANCES["float16"]


def test_decoding_in_a_cuda_graph_gives_what_it_gives_without() -> None:
    problem = of_op("hsa_decode", "bfloat16")
    arguments, options = inputs_of(problem, DEVICE).call(problem)
    with torch.no_grad():
        expected = hsa_decode(*arguments, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = hsa_decode(*arguments, **options)
        o.zero_()
        graph.replay()
    assert torch.equal(o, expected)


@pytest.mark.parametrize("op", ["hsa_forward", "hsa_backward"])
def test_a_search_times_more_than_the_default(op: str) -> None:
    problem = of_op(op, "bfloat16")
    record = tune(problem, device="cuda", options=TuneOptions(trials=8, timeout=120.0))
    assert record.trials - sum(record.failures.values()) >= 5
