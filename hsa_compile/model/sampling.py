"""From logits to the next token: greedy, or drawn with a temperature from the most likely ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.choices import MAX_SEED


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: that logits are divided by; 0 takes the most likely token.
        top_p: only the most likely tokens whose probabilities sum up to this much are drawn from; 1 for all.
        seed: row b of a batch draws with `seed + b`: as it would alone with that seed, whatever the other rows do.

    Raises:
        InvalidArgument: a value is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InvalidArgument(f"temperature = {self.temperature} must be a finite number of at least 0")
        if not 0 < self.top_p <= 1:
            raise InvalidArgument(f"top_p = {self.top_p} must be more than 0 and at most 1")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed <= MAX_SEED:
            raise InvalidArgument(f"seed = {self.seed!r} must be an integer in 0 … {MAX_SEED}")


class Sampler:
    """Draws tokens, with a stream of random numbers for each row.

    Args:
        sampling: how.
        batch: rows.
    """

    def __init__(self, sampling: Sampling, batch: int) -> None:
        self.sampling = sampling
        # On the CPU, so that every device draws the same numbers.
        self._streams = [torch.Generator().manual_seed((sampling.seed + b) % 2**63) for b in range(batch)]

    def __call__(self, logits: Tensor) -> Tensor:
        """The next token `[B]` from `logits [B, V]`."""
        if self.sampling.temperature == 0:
            return logits.argmax(dim=-1)
        uniform = torch.stack([torch.rand((), dtype=torch.float64, generator=stream) for stream in self._streams])
        return draw(logits, uniform.to(logits.device), self.sampling.temperature, self.sampling.top_p)


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """The token at which the sum of probabilities, from the most likely token on, passes a random number.

    Args:
        logits: `[B, V]`.
        uniform: `[B]` float64 in 0 … 1.
        temperature, top_p: as of `Sampling`.

    Returns:
        `[B]` int64.
    """
    scaled = (logits.double() - logits.double().amax(dim=-1, keepdim=True)) / temperature
    probabilities, tokens = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    sums = probabilities.cumsum(dim=-1)
    kept = probabilities.masked_fill(sums - probabilities >= top_p, 0.0)  # the token that passes top_p stays
    kept[:, 0] = probabilities[:, 0]
    sums = kept.cumsum(dim=-1)
    # `right`: a number on a border belongs to the next token; never one of probability 0 behind the last.
    place = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)
    last = ((kept > 0).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    return tokens.gather(1, torch.minimum(place, last))[:, 0]
