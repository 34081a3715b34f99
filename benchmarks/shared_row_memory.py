"""The peak memory of a process in one step of training on a long row of `tiny`, alone and as one of four that share it.

The four read each other's chunks in both ways: all of them gathered, and picked ones that travel.

python benchmarks/shared_row_memory.py [TOKENS]

A child process computes loss and gradients on random bytes, with activation checkpointing. What it takes is the peak of
its resident memory during the step, less what was resident before: PyTorch, the model, its kernels after a short row.
Freed memory goes back to the system at once, whatever its size: glibc would keep small blocks, and so more of four
parts than of one row.
"""

import ctypes
import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from hsa_compile.model.config import GATHER, TRAVEL
from hsa_compile.model.presets import preset
from hsa_compile.model.training.processes import Processes, shard
from hsa_compile.model.training.step import LossModel
from hsa_compile.model.transformer import HSATransformer

TOKENS, SHORT, PROCESSES = 2**18, 2**10, 4
M_MMAP_THRESHOLD, LARGEST_KEPT = -3, 2**16  # the number of the setting is from glibc's <malloc.h>


def resident(name: str) -> int:
    """Bytes of this process: `VmRSS` are resident now, `VmHWM` were at most since `forget_peak`."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def forget_peak() -> None:
    """Begins a new peak."""
    Path("/proc/self/clear_refs").write_text("5")


def step(loss_model: LossModel, length: int) -> float:
    """Loss and gradients of one row."""
    tokens = torch.randint(256, (1, length + 1), generator=torch.Generator().manual_seed(0))
    weights = torch.zeros(tokens.shape)
    weights[:, 1:][:, loss_model.model.own_text(length)] = 1 / length
    loss, _ = loss_model(tokens, weights, None)
    loss.backward()
    return float(loss)


def measure(rank: int, size: int, way: str, directory: str, length: int) -> None:
    """Writes what this process took."""
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) == 1
    torch.set_num_threads(max(1, torch.get_num_threads() // size))
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous-{size}-{way}", rank=rank, world_size=size
    )
    context = init_device_mesh("cpu", (size,)) if size > 1 else None
    torch.manual_seed(0)
    model = HSATransformer(preset("tiny")).train()
    model.checkpoint_activations, model.chunk_exchange = True, way
    loss_model = LossModel(model, loss_chunk=4096)
    shard(loss_model, model, Processes(rank=rank, world_size=size, device=torch.device("cpu"), context=context))
    step(loss_model, SHORT)
    loss_model.zero_grad()
    before = resident("VmRSS")
    forget_peak()
    loss = step(loss_model, length)
    found = {"loss": loss, "before": before, "taken": resident("VmHWM") - before}
    Path(directory, f"{size}-{way}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    """One process, then four in each way."""
    length = int(sys.argv[1]) if len(sys.argv) > 1 else TOKENS
    alone = 0
    with tempfile.TemporaryDirectory() as directory:
        for size, way in ((1, GATHER), (PROCESSES, GATHER), (PROCESSES, TRAVEL)):
            torch.multiprocessing.spawn(measure, (size, way, directory, length), nprocs=size)
            found = [json.loads(Path(directory, f"{size}-{way}-{rank}.json").read_text()) for rank in range(size)]
            taken = max(one["taken"] for one in found)
            alone = alone or taken
            each = ", ".join(f"{one['taken'] / 1e6:,.0f}" for one in found)
            print(f"{length:,} tokens, {size} processes, {way}: {each} MB above {found[0]['before'] / 1e6:,.0f} MB; "
                  f"loss {sum(one['loss'] for one in found):.6f}", flush=True)  # fmt: skip
            print(f"{taken / alone:.3f} of one process's memory in the largest", flush=True)


if __name__ == "__main__":
    main()
