"""The processes of a run: which one this is, what it runs on, and how the model is spread over all of them."""

import contextlib
import gc
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import Shard

from hsa_compile.errors import InvalidArgument, TrainingError
from hsa_compile.model.layers.moe import MoE
from hsa_compile.model.training.config import RunConfig
from hsa_compile.model.transformer import HSATransformer
from hsa_compile.paths import restart_count


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """This process among all of a run.

    Attributes:
        rank: the number of this process, from 0.
        world_size: how many processes there are.
        device: the device that this one computes on.
        context: the processes that share their rows with this one, in one dimension; None if none does.
        experts: all processes, in two dimensions: `replicas`, and the `owners` that share the experts; None if each has
            all of them.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device
    context: DeviceMesh | None = None
    experts: DeviceMesh | None = None

    @property
    def num_row_groups(self) -> int:
        """How many groups of processes there are that have rows of their own."""
        return self.world_size // (1 if self.context is None else self.context.size())

    @property
    def row_group(self) -> int:
        """The number of the group that this process belongs to."""
        return self.rank * self.num_row_groups // self.world_size

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

    def sum_of_row(self, values: Tensor) -> Tensor:
        """Returns the sum over the processes that share rows with this one, the same in each."""
        if self.context is not None:
            dist.all_reduce(values, group=self.context.get_group())
        return values

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
        # The store is torchrun's and outlives a restart: a process must not find the address that a killed one left.
        store, rank, world_size = next(rendezvous("env://"))
        store = PrefixStore(f"attempt {restart_count()}", store)
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
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


@contextlib.contextmanager
def saying_who_is_gone(
    processes: Processes, advice: str = "--resume goes on from the last checkpoint"
) -> Iterator[None]:
    """Turns the error of a collective, whose message is for experts, into one line, which ends in advice.

    Raises:
        TrainingError: another process ended while this one waited for it.
    """
    try:
        yield
    except RuntimeError as error:
        if processes.world_size == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise TrainingError(
            f"process {processes.rank} of {processes.world_size} lost another one; the first line of an error, or "
            f"torchrun's report, names that and its reason; {advice} ({error})"
        ) from error


def with_meshes(processes: Processes, run: RunConfig) -> Processes:
    """Arranges the processes as a run's `context_parallel` and `expert_parallel` say.

    Neighbours share rows, and neighbours share experts: both are best within a node.

    Raises:
        InvalidArgument: one of the two does not divide the number of processes, or the model cannot be split so.
    """
    context, experts, size = run.train.context_parallel, run.train.expert_parallel, processes.world_size
    for name, number in (("context_parallel", context), ("expert_parallel", experts)):
        if size % number:
            raise InvalidArgument(f"train.{name} = {number} must divide the number of processes, {size}")
    if context > 1 and any(layer.mixer == "full" for layer in run.model.layers):
        raise InvalidArgument(
            f"train.context_parallel = {context} is not possible with variant {run.model.variant!r}: its layers of "
            "full attention see whole rows"
        )
    if experts > 1 and run.model.num_experts % experts:
        raise InvalidArgument(
            f"train.expert_parallel = {experts} must divide model.num_experts = {run.model.num_experts}"
        )
    kind = processes.device.type
    return replace(
        processes,
        context=init_device_mesh(kind, (size // context, context), mesh_dim_names=("rows", "context"))["context"]
        if context > 1
        else None,
        experts=init_device_mesh(kind, (size // experts, experts), mesh_dim_names=("replicas", "owners"))
        if experts > 1
        else None,
    )


def shard(loss_model: nn.Module, model: HSATransformer, processes: Processes) -> None:
    """Spreads the model: each process keeps its part of all weights, gradients and optimizer state (FSDP2).

    Where experts are shared, each process keeps its part of its own experts, as do the other owners of the same ones.
    """
    if processes.world_size == 1:
        return
    model.context_mesh = processes.context
    if processes.experts is not None:
        _shard_experts(model, processes.experts)
    # A selection's weights may be a view. FSDP warns, since writing into one would lose its hook; nothing writes.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    for layer in (*model.lower, *model.upper):
        fully_shard(layer)
    fully_shard(loss_model)
    register_fsdp_forward_method(loss_model, "predict")


def _shard_experts(model: HSATransformer, mesh: DeviceMesh) -> None:
    replicas = mesh["replicas"].size()

    def placement(weight: nn.Parameter) -> Shard:
        """Returns a dimension that the replicas divide; the first is that of the experts, which the owners divide."""
        for dim in (1, 2):
            if weight.shape[dim] % replicas == 0:
                return Shard(dim)
        raise InvalidArgument(
            f"{replicas} processes hold the same experts and must divide model.dim or model.expert_dim; a larger "
            "train.expert_parallel leaves fewer of them"
        )

    for layer in model.modules():
        if isinstance(layer, MoE):
            fully_shard(layer.share_experts(mesh["owners"]), mesh=mesh["replicas"], shard_placement_fn=placement)
