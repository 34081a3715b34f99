"""The tensors that `hsa_attention` is tuned and checked on: a problem's shapes, with picks drawn or recorded."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from hsa_compile.checks import check_choice
from hsa_compile.errors import InvalidArgument
from hsa_compile.files import read_regular
from hsa_compile.problem import DISTRIBUTIONS, MAX_CHUNK_SIZE, PICKS_ENDING, Problem

LOCAL_OVERLAP = 0.8  # in `local`, the share of its picks that a token takes over from its block
LOCAL_BLOCK = 64  # in `local` and `trained`, the tokens of a block
TRAINED_OVERLAP = 0.81  # in `trained`, the share of its picks that a token has from the token before it


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """The arguments of both kernels of one problem; inputs are equal to themselves only.

    Attributes:
        q `[B, T, HQ, D]`, k `[B, S, H, D]`, v `[B, S, H, Dv]`, chunk_indices `[B, T, H, K]` int32,
        chunk_weights `[B, T, H or HQ, K]` float32 (float64 for float64 problems), grad_o `[B, T, HQ, Dv]`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    chunk_indices: Tensor
    chunk_weights: Tensor
    grad_o: Tensor

    def arguments(self, op: str) -> tuple[Tensor, ...]:
        """Returns the positional arguments of the emitted entry of `op`."""
        forward = (self.q, self.k, self.v, self.chunk_indices, self.chunk_weights)
        return forward if op == "hsa_forward" else (*forward, self.grad_o)

    def options(self, op: str) -> dict[str, float]:
        """Returns the keyword arguments of the emitted entry of `op`."""
        del op
        return {"scale": self.q.shape[-1] ** -0.5}

    def call(self, problem: Problem) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Returns the positional and keyword arguments of `hsa_attention`."""
        return self.arguments("hsa_forward"), {"chunk_size": problem.chunk_size}

    def filled(self) -> float:
        """Returns the share of the slots that hold a pick, 0 … 1."""
        return float((self.chunk_indices >= 0).double().mean())

    def with_indices(self, chunk_indices: Tensor) -> "Inputs":
        """Returns the same tensors with other picks."""
        return replace(self, chunk_indices=chunk_indices)


def make_inputs(problem: Problem, device: torch.device, *, distribution: str = "random", seed: int = 0) -> Inputs:
    """Makes random tensors of a problem's shapes, with causal picks drawn from `distribution`.

    With `random`, picks are uniform over the visible chunks, without repetition. With `local`, neighbouring tokens
    share most of their picks. With `hot`, early chunks are picked far more often than late ones, and may repeat. With
    the name of a file, picks are those that a model made (`RecordedPicks`).

    Raises:
        InvalidArgument: the distribution is unknown, or the file does not fit the problem.
    """
    # On the device: to draw the 64K tokens of 32 heads on a CPU takes longer than to time ten kernels.
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, problem.dtype)
    B, T, S, H = problem.batch, problem.seq_len, problem.kv_len, problem.num_kv_heads
    weight_heads = problem.num_heads if problem.per_head_weights else H

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    indices = pick_chunks(problem, distribution, generator)
    scores = torch.randn(B, T, weight_heads, problem.top_k, generator=generator, device=device, dtype=torch.float32)
    weights = scores.softmax(dim=-1).to(torch.float64 if problem.dtype == "float64" else torch.float32)
    return Inputs(
        q=normal(B, T, problem.num_heads, problem.head_dim),
        k=normal(B, S, H, problem.head_dim),
        v=normal(B, S, H, problem.value_dim),
        chunk_indices=indices,
        chunk_weights=weights,
        grad_o=normal(B, T, problem.num_heads, problem.value_dim),
    )


def pick_chunks(problem: Problem, distribution: str, generator: torch.Generator) -> Tensor:
    """Draws causal picks `[B, T, H, K]` int32, −1 where too few are visible; queries are the last T of S positions.

    They lie on the generator's device.
    """
    if distribution.endswith(PICKS_ENDING):
        return RecordedPicks.load(Path(distribution)).stretched(problem).to(generator.device)
    check_choice("distribution", distribution, DISTRIBUTIONS)
    B, T, H, K = problem.batch, problem.seq_len, problem.num_kv_heads, problem.top_k
    device = generator.device
    token = torch.arange(T, device=device)
    position = token + max(0, problem.kv_len - T)
    visible = (position // problem.chunk_size).clamp(max=problem.num_chunks).view(1, T, 1, 1)
    slot = torch.arange(K, device=device).view(1, 1, 1, K)
    uniform = torch.rand(B, T, H, K, generator=generator, device=device, dtype=torch.float32)
    if distribution == "hot":
        indices = (visible * uniform**3).long()
    else:
        among = visible
        if distribution == "local":
            shared = uniform[:, token // LOCAL_BLOCK * LOCAL_BLOCK]
            keep = torch.rand(B, T, H, K, generator=generator, device=device, dtype=torch.float32) < LOCAL_OVERLAP
            uniform = torch.where(keep, shared, uniform)
        if distribution == "trained":
            uniform = _drifting(uniform, generator)
            among = visible[:, token // LOCAL_BLOCK * LOCAL_BLOCK]  # else all picks would move with each new chunk
        # One pick comes from each of K strata of whole chunks: uniform, no repetition, and no [T, N] scores.
        first, past = slot * among // K, (slot + 1) * among // K
        indices = first + (uniform * (past - first)).long()
        few = among <= K
        indices = torch.where(few, slot.expand_as(indices), indices)
    return torch.where((slot < visible) & (indices < visible), indices, -1).to(torch.int32)


def _drifting(uniform: Tensor, generator: torch.Generator) -> Tensor:
    """Makes numbers `[B, T, H, K]` that drift over T: each slot of a block walks among three or four of its own.

    So a token shares 0.81 of its picks with the next, and 4, 16 and 64 neighbours have 1.5, 2.5 and 3.1 K picks
    together. In the shipped `tiny`, on source text at positions 2K to 8K, it is 0.81, and 1.43, 2.16 and 3.30 K.
    """
    B, T, H, K = uniform.shape
    blocks = -(-T // LOCAL_BLOCK)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=uniform.device, dtype=torch.float32)

    pool = drawn(B, blocks, 4, H, K)
    size = 3 + (drawn(B, blocks, H, K) < 0.35).int()
    moves = drawn(B, blocks, LOCAL_BLOCK, H, K) < 1 - TRAINED_OVERLAP
    # A move leads to any of the other numbers of the slot, all alike.
    ahead = (drawn(B, blocks, LOCAL_BLOCK, H, K) * (size - 1)[:, :, None]).int()
    steps = torch.where(moves, ahead + 1, 0)
    place = steps.cumsum(dim=2) % size[:, :, None]
    return pool.gather(2, place.long()).flatten(1, 2)[:, :T]


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedPicks:
    """The picks of a model's HSA layers on one batch, as `hsa-compile profile --record-picks` writes them.

    A file has for each layer `layers.I.chunk_indices`, int32 `[B, T, H, K]`, −1 where a slot is empty, and
    `layers.I.chunk_weights`, float32 of the same shape; beside them `chunk_size`, int64 `[1]`.

    Attributes:
        path: where they came from, for messages.
        chunk_size: `C` of the model.
        indices, weights: `[R, T, H, K]`, a row for each layer and each row of the batch.
    """

    path: Path
    chunk_size: int
    indices: Tensor
    weights: Tensor

    @staticmethod
    def load(path: Path) -> "RecordedPicks":
        """Reads a file of picks.

        Raises:
            InvalidArgument: it cannot be read, or holds something else than causal picks.
        """
        try:
            tensors = safetensors.torch.load(read_regular(path))
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no whole safetensors file"
            raise InvalidArgument(f"picks {path} cannot be read: {reason or error}") from error
        size = tensors.pop("chunk_size", torch.zeros(0, dtype=torch.int64))
        layers = sorted(name.removesuffix(".chunk_indices") for name in tensors if name.endswith(".chunk_indices"))
        names = [f"{layer}.{kind}" for layer in layers for kind in ("chunk_indices", "chunk_weights")]
        if not names or set(names) != set(tensors) or size.dtype != torch.int64 or size.shape != (1,):
            raise InvalidArgument(f"picks {path} have {sorted(tensors)}; profile --record-picks writes such files")
        shape = tuple(tensors[names[0]].shape)
        for name in names:
            tensor, dtype = tensors[name], torch.int32 if name.endswith("indices") else torch.float32
            if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape) or len(shape) != 4 or not all(shape):
                raise InvalidArgument(
                    f"picks {path} have {name} {tensor.dtype} {list(tensor.shape)}; allowed is {dtype} [B, T, H, K]"
                )
        picks = RecordedPicks(
            path=path,
            chunk_size=int(size),
            indices=torch.cat([tensors[f"{layer}.chunk_indices"] for layer in layers]),
            weights=torch.cat([tensors[f"{layer}.chunk_weights"] for layer in layers]),
        )
        picks._check()
        return picks

    def _check(self) -> None:
        if not 1 <= self.chunk_size <= MAX_CHUNK_SIZE:
            raise InvalidArgument(
                f"picks {self.path} have chunk_size {self.chunk_size}; allowed is 1 … {MAX_CHUNK_SIZE}"
            )
        visible = (torch.arange(self.indices.shape[1]) // self.chunk_size).view(1, -1, 1, 1)
        if ((self.indices < -1) | (self.indices >= visible)).any():
            raise InvalidArgument(f"picks {self.path} name a chunk that is not complete at its token")
        if not self.weights.isfinite().all():
            raise InvalidArgument(f"picks {self.path} have weights that are not finite")
        if not (self.indices >= 0).any():
            raise InvalidArgument(f"picks {self.path} are empty: no token is past the first chunk")

    def stretched(self, problem: Problem) -> Tensor:
        """Returns picks `[B, T, H, K]` of a problem's shape.

        Where there are more slots than the problem has, those with the largest weights stay. Heads and rows of the
        batch take the recorded ones in turn. A longer text repeats the recorded tokens: in repetition j, counted from
        0, the recorded chunk c stands for chunk c·(j + 1) + j, so that neighbours share what they shared, and picks
        still reach back to the beginning. A shorter text takes the first tokens, or as queries the last ones of its
        keys.

        Raises:
            InvalidArgument: chunks have another size, there are fewer slots, or the op picks for itself.
        """
        rows, tokens, heads, slots = self.indices.shape
        if problem.selects:
            raise InvalidArgument(f"{problem.op} has no picks to be given; picks {self.path} are for the attention ops")
        if self.chunk_size != problem.chunk_size:
            raise InvalidArgument(
                f"picks {self.path} have chunk_size {self.chunk_size}; the problem has {problem.chunk_size}"
            )
        if slots < problem.top_k:
            raise InvalidArgument(f"picks {self.path} have {slots} slots a token; the problem has {problem.top_k}")
        # An empty slot goes first, whatever its weight.
        kept = self.weights.masked_fill(self.indices < 0, -torch.inf).topk(problem.top_k, dim=-1, sorted=False).indices
        found = self.indices.gather(3, kept).transpose(1, 2).reshape(rows * heads, tokens, problem.top_k)
        B, T, H = problem.batch, problem.seq_len, problem.num_kv_heads
        position = torch.arange(T) + max(0, problem.kv_len - T)
        repetition = (position // tokens).view(1, 1, T, 1)
        source = torch.arange(B * H) % (rows * heads)
        picks = found[source][:, position % tokens].view(B, H, T, problem.top_k)
        picks = torch.where(picks < 0, picks, picks * (repetition + 1) + repetition)
        picks = torch.where(picks < problem.num_chunks, picks, -1)
        return picks.transpose(1, 2).to(torch.int32).contiguous()
