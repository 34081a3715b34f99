"""What processes send each other inside of the model: rows whose tokens they share, and tokens of each other's experts.

All goes through PyTorch's collectives, and gradients travel the same way back. A collective waits for all processes of
its group, so each of them calls each function here, in the same order, with parts of any size.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.layers.grouped_product import ExpertOrder, grouped_swiglu, sliced, sort_by_expert


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedRows:
    """The part of each row that this process computes, of rows that a group of processes shares.

    Part i is the tokens from `bounds[i]` to `bounds[i + 1]`. Functions take and give tensors `[B, T, …]` of the own
    part, or of other things that lie along the row, such as chunks: those have bounds of their own.

    Attributes:
        mesh: the processes in the order of their parts, in one dimension.
        bounds: `n + 1` places in the row, the first 0 and the last the row's length.
    """

    mesh: DeviceMesh
    bounds: tuple[int, ...]

    @property
    def part(self) -> int:
        """The number of the own part."""
        return self.mesh.get_local_rank()

    @property
    def start(self) -> int:
        """Where the own part begins."""
        return self.bounds[self.part]

    @property
    def end(self) -> int:
        """Where the own part ends."""
        return self.bounds[self.part + 1]

    def in_units(self, size: int) -> "SharedRows":
        """Returns the parts of the row's whole units of `size` tokens, such as chunks."""
        return SharedRows(mesh=self.mesh, bounds=tuple(bound // size for bound in self.bounds))

    def before(self, x: Tensor, count: int) -> Tensor:
        """Returns the `count` places before the own part, `[B, count, …]`; zeros where the row begins later.

        They may lie with several processes, since a part can be shorter than `count`.
        """
        wanted = [(max(0, start - count), start) for start in self.bounds[:-1]]
        sent = [self._overlap(first, last, self.part) for first, last in wanted]
        received = [self._overlap(*wanted[self.part], part) for part in range(len(self.bounds) - 1)]
        rows = torch.cat([x[:, first - self.start : last - self.start] for first, last in sent], dim=1)
        found = all_to_all(rows.movedim(1, 0), [last - first for first, last in sent],
                       [last - first for first, last in received], self.mesh.get_group()).movedim(0, 1)  # fmt: skip
        return F.pad(found, (0, 0) * (x.dim() - 2) + (count - found.shape[1], 0))

    def gather(self, x: Tensor) -> Tensor:
        """Returns the whole row, `[B, bounds[-1], …]`, of `x [B, end − start, …]`; the gradient is summed and split."""
        sizes = [last - first for first, last in pairwise(self.bounds)]
        longest = max(sizes)
        padded = F.pad(x, (0, 0) * (x.dim() - 2) + (0, longest - x.shape[1]))
        one = DTensor.from_local(padded, self.mesh, [Shard(1)], run_check=False)
        whole = one.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        if all(size == longest for size in sizes):
            return whole
        parts = whole.split(longest, dim=1)
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)

    def fetch(self, own: Tensor, wanted: Tensor) -> Tensor:
        """Brings some places of the row to this process; each process may want others.

        The gradient travels back in the same way. The owner of a place adds up what comes, process by process, so that
        every run gives the same bits.

        Args:
            own: `[end − start, …]`, the own part.
            wanted: `[R]` int64, places in the row in rising order, none of them twice. How many lie with each process
                is read on the host.

        Returns:
            `[R, …]`, in the order of `wanted`.
        """
        group = self.mesh.get_group()
        counts = torch.searchsorted(wanted, torch.tensor(self.bounds, device=wanted.device)).diff()
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, group=group)
        asked, came = torch.stack((counts, theirs)).tolist()
        places = all_to_all(wanted, asked, came, group) - self.start
        return all_to_all(_Copies.apply(own, places, came), came, asked, group)

    def _overlap(self, first: int, last: int, part: int) -> tuple[int, int]:
        """Returns where the places from `first` to `last` lie in a part; an empty stretch of it if they do not."""
        low = min(max(first, self.bounds[part]), self.bounds[part + 1])
        return low, max(low, min(last, self.bounds[part + 1]))


def share_rows(mesh: DeviceMesh, length: int, unit: int) -> SharedRows:
    """Splits rows of `length` tokens into one part for each process, at multiples of `unit`, as evenly as these allow.

    Raises:
        InvalidArgument: there are fewer units than processes.
    """
    parts, units = mesh.size(), -(-length // unit)
    if units < parts:
        raise InvalidArgument(
            f"a row of {length} tokens has {units} chunks of {unit}; train.context_parallel = {parts} needs one for "
            "each process"
        )
    bounds = [min(length, units * part // parts * unit) for part in range(parts + 1)]
    return SharedRows(mesh=mesh, bounds=tuple(bounds))


class _Copies(torch.autograd.Function):
    """Copies rows, `places [R]`, of a table for several processes, each of which wants a row at most once."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, places: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(places)
        ctx.counts, ctx.shape = counts, table.shape
        return table.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        total = grads[0].new_zeros(ctx.shape, dtype=torch.promote_types(grads[0].dtype, torch.float32))
        for at, grad in zip(places.split(ctx.counts), grads[0].split(ctx.counts), strict=True):
            total.index_add_(0, at, grad.to(total.dtype))  # no place twice, so that no order of additions is left open
        return total.to(grads[0].dtype), None, None


def all_to_all(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Sends `sent[i]` of the rows to process i and returns those that come, `received[i]` from process i, in order."""
    return all_to_all_single_autograd(rows.contiguous(), received, sent, group)


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchedTokens:
    """Tokens at the process that holds their experts.

    Attributes:
        rows: `[R, dim]`, one for each pair of a token and an expert of this process.
        experts: `[R]`, the number of each row's expert among those of this process.
        came, went: how many rows came from each process, and how many went to each.
    """

    rows: Tensor
    experts: Tensor
    came: list[int]
    went: list[int]


class LocalExperts(nn.Module):
    """The experts that one process holds, of a MoE layer whose experts a group of processes shares.

    Process i of n holds the i-th n-th of them.

    Args:
        gate_up: `[E, dim, 2 · expert_dim]`, those of all processes.
        down: `[E, expert_dim, dim]`.
        mesh: the processes that share them; `E` is a multiple of their number.
    """

    def __init__(self, gate_up: Tensor, down: Tensor, mesh: DeviceMesh) -> None:
        super().__init__()
        self.group = mesh.get_group()
        for name, weight in (("gate_up", gate_up), ("down", down)):
            local = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)
            self.register_parameter(name, nn.Parameter(local))

    def dispatch(self, tokens: Tensor, pairs: ExpertOrder, experts_per_token: int) -> DispatchedTokens:
        """Sends `tokens [T, dim]` to their experts. The sizes of what is sent are read on the host."""
        size = self.group.size()
        counts = pairs.counts.view(size, -1)  # [process, expert there]
        theirs = torch.empty_like(counts)  # [process, expert here]
        dist.all_to_all_single(theirs, counts, group=self.group)
        went, came = torch.stack((counts.sum(dim=1), theirs.sum(dim=1))).tolist()
        rows = all_to_all(tokens.index_select(0, pairs.order // experts_per_token), went, came, self.group)
        here = torch.arange(counts.shape[1], device=tokens.device).repeat(size)
        return DispatchedTokens(rows=rows, experts=here.repeat_interleave(theirs.flatten()), came=came, went=went)

    def forward(self, tokens: DispatchedTokens) -> Tensor:
        """Runs the tokens through their experts and sends them back, `[P, dim]` in the order in which they went."""
        rows = tokens.rows
        gate_up, down = (self._weight(weight).to(rows.dtype) for weight in (self.gate_up, self.down))
        pairs = sort_by_expert(tokens.experts.unsqueeze(1), gate_up.shape[0])
        out = grouped_swiglu(rows, rows.new_ones(rows.shape[0], 1), pairs, gate_up, down, sliced)
        return all_to_all(out, tokens.came, tokens.went, self.group)

    def _weight(self, weight: Tensor | nn.Module) -> Tensor:
        """Returns the own part of a weight. Its gradient comes from the tokens of all owners of the layer's experts.

        FSDP takes the mean over the processes that hold the same experts, and of other weights over all processes: a
        sum over the owners becomes a mean here, so that all gradients have one scale.
        """
        local = cast(DTensor, weight).to_local()
        if local.requires_grad:
            local.register_hook(lambda grad: grad / self.group.size())
        return local


def state_from_parts(states: Tensor, log_decays: Tensor, part: int) -> Tensor:
    """Combines what each part of a row adds to a recurrent state into the state before one of the parts.

    Args:
        states: `[B, n, heads, …]`, the state after each part if it begins with zero.
        log_decays: `[B, n, heads]`, the logarithm of what each part leaves of the state before it.
        part: the part before which the state is wanted.
    """
    later = list(accumulate(reversed(log_decays[:, :part].unbind(1)), initial=torch.zeros_like(log_decays[:, 0])))
    keep = torch.stack([*reversed(later[:-1]), *log_decays[:, part:].unbind(1)], dim=1).exp()  # [B, n, heads]
    is_before = torch.arange(states.shape[1], device=states.device) < part
    keep = torch.where(is_before[:, None], keep, 0)
    return (states * keep.to(states.dtype).view(*keep.shape, *[1] * (states.dim() - 3))).sum(dim=1)
