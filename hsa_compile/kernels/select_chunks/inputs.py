"""The tensors that `select_chunks` is tuned and checked on."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hsa_compile.kernels.gumbel import noise_keys
from hsa_compile.kernels.hsa_attention.inputs import LOCAL_BLOCK, pick_chunks
from hsa_compile.problem import Problem

NOISE_SEED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectInputs:
    """The arguments of both kernels of one selection problem.

    Attributes:
        query `[B, T, H, Dr]`, landmarks `[B, N·R, H, Dr]`, noise_keys `[B, T, H]` int32 or None, landmark_indices and
        grad_weights `[B, T, H, K]`, as the backward kernel gets them.
        landmarks_per_chunk: `R`.
        top_k: `K`.
        offset: the position of the first query row: queries are the last `T` of `N·C` positions.
    """

    query: Tensor
    landmarks: Tensor
    noise_keys: Tensor | None
    landmark_indices: Tensor
    grad_weights: Tensor
    landmarks_per_chunk: int
    top_k: int
    offset: int

    def arguments(self, op: str) -> tuple[Tensor | None, ...]:
        """Returns the positional arguments of the emitted entry of `op`."""
        if op == "select_chunks":
            return (self.query, self.landmarks, self.noise_keys)
        return (self.query, self.landmarks, self.landmark_indices, self.grad_weights)

    def options(self, op: str) -> dict[str, int]:
        """Returns the keyword arguments of the emitted entry of `op`."""
        return {"top_k": self.top_k, "offset": self.offset} if op == "select_chunks" else {}

    def call(self, problem: Problem) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Returns the positional and keyword arguments of `select_chunks`."""
        landmarks = self.landmarks
        if self.landmarks_per_chunk > 1:
            landmarks = landmarks.unflatten(1, (problem.num_chunks, self.landmarks_per_chunk))
        return (self.query, landmarks), {"chunk_size": problem.chunk_size, "top_k": self.top_k}

    def filled(self) -> float:
        """Returns 1: all slots count, since a selection scores every visible chunk, whatever is picked."""
        return 1.0

    def positions(self) -> Tensor:
        """Returns the absolute positions of the query rows, `[T]`."""
        return torch.arange(self.query.shape[1], device=self.query.device) + self.offset


def make_select_inputs(
    problem: Problem, device: torch.device, *, distribution: str = "random", seed: int = 0
) -> SelectInputs:
    """Makes queries and landmarks whose picks fall as `distribution` says.

    With `random`, all are normal. With `local` and `trained`, neighbouring queries are alike. With `hot`, early
    landmarks score far from zero.

    Raises:
        InvalidArgument: the distribution is unknown.
    """
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, problem.dtype)
    B, T, H, N, D = problem.batch, problem.seq_len, problem.num_kv_heads, problem.num_landmarks, problem.head_dim
    R = problem.landmarks_per_chunk

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

    chunks = pick_chunks(problem, distribution, generator).sort(dim=-1, descending=True).values
    one_of_each = torch.arange(problem.top_k, dtype=torch.int32, device=device) % R
    picks = torch.where(chunks < 0, -1, chunks * R + one_of_each)
    query, landmarks = normal(B, T, H, D), normal(B, N, H, D)
    token = torch.arange(T, device=device)
    if distribution in ("local", "trained"):
        query = 0.3 * query + query[:, token // LOCAL_BLOCK * LOCAL_BLOCK]
    if distribution == "hot":
        landmarks[:, : N // 8] *= 3
    offset = max(0, problem.num_chunks * problem.chunk_size - T)
    grad_dtype = torch.float64 if problem.dtype == "float64" else torch.float32
    return SelectInputs(
        query=query.to(dtype),
        landmarks=landmarks.to(dtype),
        noise_keys=noise_keys(NOISE_SEED, B, H, token + offset) if problem.noise else None,
        landmark_indices=picks,
        grad_weights=normal(B, T, H, problem.top_k).to(grad_dtype),
        landmarks_per_chunk=R,
        top_k=problem.top_k,
        offset=offset,
    )
