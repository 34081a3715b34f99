"""The processes of a run: which one this is, what it runs on, and how the model is spread over all of them."""

import gc
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from hsa_compile.model.transformer import HSATransformer


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """This process among all of a run.

    Attributes:
        rank: the number of this process, from 0.
        world_size: how many processes there are.
        device: the device that this one computes on.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this one writes files and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum of a small tensor over all processes, the same in each."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Returns what each process gave, plain values, in the order of their ranks."""
        found = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.world_size > 1:
            dist.barrier()


def join_processes() -> Processes:
    """Joins the others that `torchrun` started, if it did; on CUDA each process takes a device."""
    on_cuda = torch.cuda.is_available()
    if not dist.is_torchelastic_launched():
        return Processes(device=torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu"))
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    rank = dist.get_rank()
    device = torch.device("cpu")
    if on_cuda:
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return Processes(rank=rank, world_size=dist.get_world_size(), device=device)


def leave_processes() -> None:
    """Ends what `join_processes` began."""
    if dist.is_initialized():
        # Modules refer to themselves through FSDP's hooks. Collected now, no thread of the group has to free their
        # tensors while the interpreter shuts down, which would abort the process.
        gc.collect()
        dist.destroy_process_group()


def shard(loss_model: nn.Module, model: HSATransformer, processes: Processes) -> None:
    """Shards the model with FSDP2: each process keeps its part of all weights, gradients and optimizer state."""
    if processes.world_size == 1:
        return
    # A selection's weights may be a view. FSDP warns, since writing into one would lose its hook; nothing writes.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    for layer in (*model.lower, *model.upper):
        fully_shard(layer)
    fully_shard(loss_model)
    register_fsdp_forward_method(loss_model, "predict")
