"""select_chunks on a CPU against dense scores and `torch.topk`: time and peak memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hsa_compile import Problem, Target, default_cache, select_chunks, tune
from hsa_compile.kernels.select_chunks.inputs import make_select_inputs

SEQ_LEN, CHUNK_SIZE, TOP_K, DIM = 16384, 64, 8, 64
DENSE_BYTES = 4 * SEQ_LEN * (SEQ_LEN // CHUNK_SIZE)  # the score matrix of one head
LARGEST_SHARE = 0.05  # of it, that selection may allocate beyond its inputs and outputs

PEAK_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[2])
from test_select_chunks_cpu import peak_extra_bytes
print(peak_extra_bytes(int(sys.argv[1])))
"""


def problem(num_heads: int) -> Problem:
    return Problem(
        op="select_chunks", seq_len=SEQ_LEN, num_heads=num_heads, num_kv_heads=num_heads, head_dim=DIM,
        chunk_size=CHUNK_SIZE, top_k=TOP_K,
    )  # fmt: skip


def dense(query: Tensor, landmarks: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """What one writes without the op: all scores, the causal mask, `topk` and softmax."""
    scores = query.transpose(1, 2) @ landmarks.permute(0, 2, 3, 1)  # [B, H, T, N]
    best, indices = scores.mul_(DIM**-0.5).masked_fill_(~visible, -1e30).topk(TOP_K, dim=-1)
    return indices, best.softmax(dim=-1)


def visible_chunks() -> Tensor:
    """`[T, N]`."""
    return torch.arange(SEQ_LEN)[:, None] >= (torch.arange(SEQ_LEN // CHUNK_SIZE) + 1) * CHUNK_SIZE


@pytest.mark.parametrize("num_heads", [1, 2], ids=["H1", "H2"])
@pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")
def test_selection(num_heads: int, race) -> None:
    wanted, target = problem(num_heads), Target.parse("cpu")
    if default_cache().exact(wanted, target) is None:
        default_cache().put(tune(wanted, target, timeout=60))
    inputs, visible = make_select_inputs(wanted, torch.device("cpu")), visible_chunks()
    contenders = {
        "select_chunks": lambda: select_chunks(inputs.query, inputs.landmarks, chunk_size=CHUNK_SIZE, top_k=TOP_K),
        "dense matmul + topk": lambda: dense(inputs.query, inputs.landmarks, visible),
    }
    race(contenders, 15, {"dense matmul + topk": 1})


def peak_extra_bytes(num_heads: int) -> int:
    """What one call adds to the process's memory at most, less its outputs; for a process of its own, on Linux."""
    torch.set_num_threads(2)
    inputs = make_select_inputs(problem(num_heads), torch.device("cpu"))
    arguments = {"chunk_size": CHUNK_SIZE, "top_k": TOP_K}
    for length in (1, 8):  # the library, the threads' stacks and PyTorch's own buffers
        select_chunks(inputs.query[:, :length], inputs.landmarks, offset=SEQ_LEN - length, **arguments)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmHWM")
    indices, weights = select_chunks(inputs.query, inputs.landmarks, **arguments)
    return _status("VmHWM") - before - indices.nbytes - weights.nbytes


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@pytest.mark.parametrize("num_heads", [1, 2], ids=["H1", "H2"])
def test_peak_memory(num_heads: int, benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-W", "ignore", "-c", PEAK_SCRIPT, str(num_heads), str(Path(__file__).parent)]
    done = benchmark.pedantic(subprocess.run, (command,), {"capture_output": True, "text": True, "check": True})
    extra, scores = max(0, int(done.stdout)), num_heads * DENSE_BYTES
    with capsys.disabled():
        share = f"{extra / scores:.1%} of {scores / 2**20:.0f} MiB of scores"
        print(f"\n  {extra / 2**20:.2f} MiB beyond the outputs, {share}")
    assert extra <= LARGEST_SHARE * scores
