"""Memory of forward and backward grows with the length, never with its square."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hsa_compile import Problem, hsa_attention
from hsa_compile.kernels.hsa_attention.inputs import make_inputs

# Linux forgets a process's peak when told to: what is read afterwards is the peak of what ran in between.
PROLOGUE = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
from hsa_compile import Problem, hsa_attention, select_chunks
from hsa_compile.kernels.hsa_attention.inputs import make_inputs

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")
"""
PEAK_SCRIPT = (
    PROLOGUE
    + """
def step(T):
    problem = Problem(seq_len=T, num_heads=16, num_kv_heads=1, head_dim=64, chunk_size=64, top_k=8)
    inputs = make_inputs(problem, torch.device("cpu"))
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.chunk_weights)]
    before = forget_peak()
    o = hsa_attention(*leaves[:3], inputs.chunk_indices, leaves[3], chunk_size=64)
    torch.autograd.grad(o, leaves, inputs.grad_o)
    return status("VmHWM") - before

step(256)  # libraries' own buffers
print(step(int(sys.argv[1])))
"""
)
needs_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")


def peak_extra_bytes(seq_len: int) -> int:
    done = subprocess.run([sys.executable, "-c", PEAK_SCRIPT, str(seq_len)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@needs_linux
@pytest.mark.exhaustive
def test_peak_is_linear_in_the_length() -> None:
    outputs = 2 * 16384 * 16 * 64 * 4  # o and dq, which are never freed in between
    shorter = peak_extra_bytes(16384)
    assert shorter >= outputs
    assert peak_extra_bytes(32768) <= 2.2 * shorter


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operator's result had."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")
@pytest.mark.parametrize("family", ["torch", pytest.param("cpp", marks=pytest.mark.slow)], indirect=True)
def test_no_tensor_has_tokens_times_chunks_elements(family: str) -> None:
    problem = Problem(seq_len=4096, num_heads=2, num_kv_heads=1, head_dim=16, chunk_size=8, top_k=4)
    inputs = make_inputs(problem, torch.device("cpu"))
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.chunk_weights)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # then all operators run on this thread, where the mode sees them
    try:
        with LargestTensor() as largest:
            o = hsa_attention(*leaves[:3], inputs.chunk_indices, leaves[3], chunk_size=8)
            torch.autograd.grad(o, leaves, inputs.grad_o)
    finally:
        torch.set_num_threads(threads)
    assert inputs.q.numel() <= largest.numel <= problem.seq_len * problem.num_chunks / 4


LONG_SCRIPT = (
    PROLOGUE
    + """
def step(T):
    HQ, H, D, C, K = 4, 2, 64, 64, 8
    q, k, v, grad_o = (torch.randn(1, T, heads, D) for heads in (HQ, H, H, HQ))
    query, landmarks = torch.randn(1, T, H, D), torch.randn(1, T // C, H, D)
    inputs = [x.requires_grad_() for x in (q, k, v, query, landmarks)]
    before = forget_peak()
    indices, weights = select_chunks(query, landmarks, chunk_size=C, top_k=K)
    o = hsa_attention(q, k, v, indices, weights, chunk_size=C)
    gradients = torch.autograd.grad(o, inputs, grad_o)
    declared = [o, *gradients, indices, weights]
    tensors = sum(x.numel() * x.element_size() for x in (*inputs, grad_o, *declared))
    new = sum(x.numel() * x.element_size() for x in declared)
    return status("VmHWM") - before, tensors, new

step(2048)  # libraries' own buffers
extra, tensors, new = step(131072)
print(extra, tensors, new)
"""
)


@needs_linux
@pytest.mark.exhaustive
def test_attention_and_selection_of_131072_tokens_need_little_beyond_their_results() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LONG_SCRIPT], capture_output=True, text=True, check=True
    )  # fmt: skip
    extra, tensors, new = (int(word) for word in done.stdout.split())
    assert extra >= new * 0.9
    # Everything that there is, results included, is at most 1.2 times inputs, outputs, gradients and slots.
    assert extra - new <= 0.2 * tensors
