"""The small parts that every layer is built from: RMSNorm, SwiGLU, RoPE, autocast's switches, names in traces."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import profiler


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension (arXiv 1910.07467).

    Args:
        dim: size of the dimension that is normalised.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `x [..., dim]`, in the weight's dtype; the mean is taken in float32 at least."""
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)


class ShortConvolution(nn.Module):
    """A causal depthwise convolution: adds the tokens before to each token, with a weight for each channel.

    Args:
        dim: how many channels there are.
        window: how many tokens each output is made of, the own one included, whose weight is 1.
    """

    def __init__(self, dim: int, window: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(window - 1, dim))

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Returns `[B, T, dim]` for `x [B, T, dim]`, where `before [B, window - 1, dim]` are the tokens before it."""
        rows, (size, length) = torch.cat((before, x), dim=1), (before.shape[1], x.shape[1])
        for back, weight in enumerate(self.weight, start=1):
            x = torch.addcmul(x, rows[:, size - back : size - back + length], weight)
        return x


class SwiGLU(nn.Module):
    """The gated MLP `down(silu(gate(x)) · up(x))` (arXiv 2002.05202).

    Args:
        dim: width of the input and of the output.
        hidden_dim: inner width.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Runs `x [..., dim]` through the MLP; the shape stays."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def rope_angles(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines of RoPE (arXiv 2104.09864), good to the last bit at any position.

    An angle is a position times a frequency; beyond a million tokens float32 would be wrong in the first digit of
    its fraction, so the angle is made in float64 and rounded last.

    Args:
        positions: `[...]` integers.
        head_dim: `D`, even.
        theta: base of the frequencies.
        dtype: the dtype of the result.

    Returns:
        cos and sin `[..., D / 2]`.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim
    angles = positions.to(torch.float64)[..., None] * theta**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs `(i, i + D/2)` of `x [B, T, heads, D]` by the angles `[B or 1, T, D / 2]` of `rope_angles`."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Returns a context in which products run in the dtype of their tensors."""
    return torch.autocast(device.type, enabled=False) if _is_on(device) else nullcontext()


def kernel_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype that kernels want `x` in: autocast's where it is on, but on a CPU that of `x`."""
    is_cast = x.device.type != "cpu" and _is_on(x.device)
    return torch.get_autocast_dtype(x.device.type) if is_cast else x.dtype


def without_cpu_autocast(*tensors: Tensor) -> tuple[AbstractContextManager[Any], tuple[Tensor, ...]]:
    """Returns a context and tensors for kernels that want float32 on a CPU: no autocast there, and float32 tensors."""
    device = tensors[0].device
    if device.type == "cpu" and _is_on(device):
        return no_autocast(device), tuple(x.float() for x in tensors)
    return nullcontext(), tensors


def traced(part: str) -> AbstractContextManager[Any]:
    """Returns a context that a trace of PyTorch's profiler shows under a name; without a profiler it does nothing."""
    # Compiled code must not depend on whether a profiler runs: it would be compiled again when one starts.
    if torch.compiler.is_compiling() or not profiler._is_profiler_enabled:
        return nullcontext()
    return profiler.record_function(part)


def _is_on(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)  # the meta device knows no autocast
