"""The Mamba-2 layer (arXiv 2405.21060): a recurrent mixer of tokens whose state has a fixed size."""

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.layers.basic import RMSNorm, no_autocast
from hsa_compile.model.layers.exchange import SharedRows, state_from_parts

# Pairs of tokens, over all rows and heads, whose decays are in memory at once; on the CPU they stay in its cache.
PAIRS_PER_PASS = 2**26
PAIRS_PER_PASS_CPU = 2**18
STEP_RANGE = (1e-3, 1e-1)  # the range of dt at the start of training, as published
DECAY_RANGE = (1.0, 16.0)  # the range of −A at the start of training, as published


def ssd_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk_length: int
) -> tuple[Tensor, Tensor]:
    """Computes `h_t = exp(dt_t · A) h_{t-1} + dt_t x_t ⊗ B_t` and `y_t = h_t C_t`, in time and memory linear in T.

    Here decays inside a chunk are differences of float64 sums. The paper's listing sums each pair's steps instead, to
    the same end: where a large step is followed by small ones, differences in float32 lose the small ones.

    Args:
        x: `[B, T, heads, head_dim]`.
        dt: `[B, T, heads]`, step sizes ≥ 0; a token with 0 leaves the state as it is.
        A: `[heads]`, negative.
        B, C: `[B, T, state_dim]`, shared by all heads.
        state: `[B, heads, head_dim, state_dim]` before the first token.
        chunk_length: how many tokens are computed pair by pair; the state carries what lies beyond them.

    Returns:
        y `[B, T, heads, head_dim]`, and the state after the last token.
    """
    num_tokens = x.shape[1]
    pairs_per_pass = PAIRS_PER_PASS_CPU if x.device.type == "cpu" else PAIRS_PER_PASS
    chunks_per_pass = pairs_per_pass // (x.shape[0] * x.shape[2] * chunk_length**2) or 1
    whole = num_tokens - num_tokens % chunk_length
    starts = [*range(0, whole, chunks_per_pass * chunk_length), whole]
    passes = [(slice(*bounds), chunk_length) for bounds in pairwise(starts)]
    if whole < num_tokens:
        passes.append((slice(whole, num_tokens), num_tokens - whole))
    outputs = []
    for part, length in passes:
        y, state = _scan_chunks(x[:, part], dt[:, part], A, B[:, part], C[:, part], state, length)
        outputs.append(y)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), state


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `ssd_scan` for one token; shapes are as there, without T."""
    state = state * (dt * A).exp()[..., None, None] + (x * dt.unsqueeze(-1)).unsqueeze(-1) * B[:, None, None]
    return (state @ C[:, None, :, None]).squeeze(-1), state


def _scan_chunks(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    batch, num_tokens, heads, head_dim = x.shape
    chunks = (batch, num_tokens // length, length)  # b, c, l
    B, C = B.reshape(*chunks, -1), C.reshape(*chunks, -1)
    steps = (x * dt.unsqueeze(-1)).reshape(*chunks, heads, head_dim)
    log_decay = (dt.double() * A.double()).reshape(*chunks, heads).cumsum(dim=2)  # from the chunk's start
    from_start = log_decay.to(x.dtype).exp().unsqueeze(-1)  # [b, c, l, heads, 1]
    to_end = (log_decay[:, :, -1:] - log_decay).to(x.dtype).exp().unsqueeze(-1)

    # Pairs inside a chunk.
    pairs = (C @ B.mT).unsqueeze(2) * _pair_decay(log_decay, x.dtype)  # [b, c, heads, l, l]
    y = (pairs @ steps.transpose(2, 3)).transpose(2, 3)

    # What each chunk adds to the state, the states between chunks, and what they add to the outputs.
    added = (steps * to_end).flatten(3).mT @ B  # [b, c, heads · head_dim, n]
    added = added.unflatten(2, (heads, head_dim))
    before, state = _pass_states(added, from_start[:, :, -1].unsqueeze(-1), state)
    y = y + (C @ before.flatten(2, 3).mT).unflatten(3, (heads, head_dim)) * from_start
    return y.reshape(x.shape), state


def _pair_decay(log_decay: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `[b, c, heads, l, l]`, the decay from each token to each later one of its chunk."""
    log_decay = log_decay.transpose(2, 3)
    length = log_decay.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool, device=log_decay.device).triu(1)
    between = (log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)).to(dtype)
    # The mask comes before the exponential: after it, infinity times zero would poison the gradient.
    return between.masked_fill(later, -torch.inf).exp()


def _pass_states(added: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Passes the state on from chunk to chunk.

    Args:
        added: `[b, c, heads, head_dim, n]`, what each chunk adds to the state.
        decay: `[b, c, heads, 1, 1]`, what is left of the state after each chunk.
        state: `[b, heads, head_dim, n]`, the state before the first chunk.

    Returns:
        the state before each chunk, shaped as `added`, and the state after the last.
    """
    before = []
    for add, keep in zip(added.unbind(1), decay.unbind(1), strict=True):
        before.append(state)
        state = torch.addcmul(add, state, keep)
    return torch.stack(before, dim=1), state


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba2State:
    """All that a Mamba-2 layer keeps of the tokens it has read.

    Attributes:
        conv: `[B, conv_width - 1, channels]`, the last inputs of the convolution.
        ssm: `[B, heads, head_dim, state_dim]`, float32 at least.
    """

    conv: Tensor
    ssm: Tensor

    def __post_init__(self) -> None:
        if self.conv.ndim != 3 or self.ssm.ndim != 4 or len(self.conv) != len(self.ssm):
            raise InvalidArgument(
                f"a Mamba2State needs conv [B, W, channels] and ssm [B, H, P, N], not {[*self.conv.shape]} and "
                f"{[*self.ssm.shape]}"
            )

    def to(self, *args: Any, **kwargs: Any) -> "Mamba2State":
        """Moves or casts both tensors through `Tensor.to`."""
        return Mamba2State(conv=self.conv.to(*args, **kwargs), ssm=self.ssm.to(*args, **kwargs))


class Mamba2(nn.Module):
    """A Mamba-2 mixer with one group of B and C; parameters are named and shaped as in the published code.

    On CUDA the scan is `mamba_ssm`'s where that package is installed; the scan runs in float32 at least.

    Args:
        dim: width of the input and of the output.
        state_dim: `N`, the size of the state of a channel.
        head_dim: `P`, the size of a head; `expand · dim` must be a multiple of it.
        expand: inner width as a multiple of `dim`.
        conv_width: width of the causal depthwise convolution.
        chunk_length: chunk length of the scan; any value gives the same result.
        norm_eps: what the gated RMSNorm adds to the mean square.

    Raises:
        InvalidArgument: a size is below 1, or heads do not fill the inner width.
    """

    def __init__(
        self,
        dim: int,
        *,
        state_dim: int = 64,
        head_dim: int = 32,
        expand: int = 2,
        conv_width: int = 4,
        chunk_length: int = 32,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "state_dim": state_dim, "head_dim": head_dim, "expand": expand}
        for name, size in {**sizes, "conv_width": conv_width, "chunk_length": chunk_length}.items():
            if size < 1:
                raise InvalidArgument(f"{name} is {size}; it must be at least 1")
        inner = expand * dim
        if inner % head_dim:
            raise InvalidArgument(f"head_dim is {head_dim}; it must divide expand · dim = {inner}")
        self.inner, self.state_dim, self.head_dim = inner, state_dim, head_dim
        self.num_heads = inner // head_dim
        self.conv_width, self.chunk_length = conv_width, chunk_length
        self.channels = inner + 2 * state_dim  # x, B, C
        self.in_proj = nn.Linear(dim, inner + self.channels + self.num_heads, bias=False)  # z, x, B, C, dt
        self.conv1d = nn.Conv1d(self.channels, self.channels, conv_width, groups=self.channels)
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.norm = RMSNorm(inner, norm_eps)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draws all weights anew: projections normal, the rest as published."""
        for projection in (self.in_proj, self.out_proj):
            nn.init.normal_(projection.weight, std=std)
        self.conv1d.reset_parameters()
        nn.init.ones_(self.D)
        nn.init.ones_(self.norm.weight)
        if self.A_log.is_meta:
            return  # there is nothing to draw, and to take a logarithm there imports torch._dynamo
        with torch.no_grad():
            self.A_log.uniform_(*DECAY_RANGE).log_()
            dt = torch.empty_like(self.dt_bias).uniform_(*map(math.log, STEP_RANGE)).exp()
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt

    def initial_state(self, batch: int, like: Tensor) -> Mamba2State:
        """Returns the state before the first token, on the device and for the dtype of `like`."""
        ssm_dtype = torch.promote_types(like.dtype, torch.float32)
        return Mamba2State(
            conv=like.new_zeros(batch, self.conv_width - 1, self.channels),
            ssm=like.new_zeros(batch, self.num_heads, self.head_dim, self.state_dim, dtype=ssm_dtype),
        )

    def forward(
        self,
        x: Tensor,
        state: Mamba2State | None = None,
        num_valid: Tensor | None = None,
        shared: SharedRows | None = None,
    ) -> tuple[Tensor, Mamba2State]:
        """Reads on from a state; texts cut into pieces of any size give the same outputs.

        Args:
            x: `[B, T, dim]`; T may be 0.
            state: the state after the tokens before; None at the start.
            num_valid: `[B]` integers; the tokens of row b from `num_valid[b]` on are padding: they leave the state as
                it is, and their outputs mean nothing. None where there is no padding.
            shared: the part of the rows that `x` is, where processes share them; the state that is returned is then
                that of the part alone.

        Returns:
            `[B, T, dim]`, and the state after each row's last valid token.
        """
        z, conv_in, dt = self.in_proj(x).split((self.inner, self.channels, self.num_heads), dim=-1)
        state = self.initial_state(x.shape[0], conv_in) if state is None else state
        if x.shape[1] == 0:
            return self.out_proj(z), state
        before = state.conv if shared is None else shared.before(conv_in, self.conv_width - 1)
        window = torch.cat((before.to(conv_in.dtype), conv_in), dim=1)  # [B, conv_width - 1 + T, channels]
        valid = None if num_valid is None else num_valid.to(x.device)
        y, ssm = self._scan(self._convolve(window), dt, state.ssm, valid, shared)
        y = self.norm((y * F.silu(z)).to(self.norm.weight.dtype))
        return self.out_proj(y), Mamba2State(conv=self._last_inputs(window, valid), ssm=ssm)

    def _convolve(self, window: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return F.silu(self.conv1d(window.transpose(1, 2)).transpose(1, 2))
        # This is the same without a transposed copy, and several times as fast; its backward pass would not be.
        assert self.conv1d.bias is not None
        y = self.conv1d.bias.to(window.dtype)
        num_tokens = window.shape[1] - self.conv_width + 1
        for k, weight in enumerate(self.conv1d.weight.to(window.dtype).unbind(-1)):
            y = torch.addcmul(y, window[:, k : k + num_tokens], weight.squeeze(1))
        return F.silu(y)

    def _scan(
        self, xbc: Tensor, dt: Tensor, state: Tensor, valid: Tensor | None, shared: SharedRows | None
    ) -> tuple[Tensor, Tensor]:
        """Scans `xbc [B, T, channels]` with `dt [B, T, heads]`; returns y `[B, T, inner]` and the state."""
        dtype = state.dtype
        dt = F.softplus(dt.to(dtype) + self.dt_bias.to(dtype))
        if valid is not None:
            dt = dt * (torch.arange(dt.shape[1], device=dt.device) < valid[:, None]).unsqueeze(-1)
        A = -self.A_log.to(dtype).exp()
        x, B, C = xbc.split((self.inner, self.state_dim, self.state_dim), dim=-1)
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        fused = _fused_scan() if x.is_cuda and x.shape[1] > 1 else None
        with no_autocast(x.device):
            if fused is not None:
                y, state = fused(x, dt, A, B, C, state)
            elif x.shape[1] == 1 and shared is None:
                y, state = ssd_step(x[:, 0].to(dtype), dt[:, 0], A, B[:, 0].to(dtype), C[:, 0].to(dtype), state)
                y = y.unsqueeze(1)
            else:
                y, state = ssd_scan(x.to(dtype), dt, A, B.to(dtype), C.to(dtype), state, self.chunk_length)
            if shared is not None:
                y = y + _from_earlier_parts(dt, A, C.to(dtype), state, shared)
            y = y + self.D.to(dtype).unsqueeze(-1) * x
        return y.flatten(2), state

    def _last_inputs(self, window: Tensor, valid: Tensor | None) -> Tensor:
        keep = self.conv_width - 1
        if valid is None:
            return window[:, window.shape[1] - keep :].clone()  # a view would keep the whole window alive
        places = valid[:, None] + torch.arange(keep, device=window.device)
        return window.gather(1, places.unsqueeze(-1).expand(-1, -1, self.channels))


def _from_earlier_parts(dt: Tensor, A: Tensor, C: Tensor, state: Tensor, shared: SharedRows) -> Tensor:
    """Returns what the state before this part of the rows adds to y, `[B, T, heads, head_dim]`.

    Each part scans from a state of zero, at the same time as the others; y is linear in the state before it.

    Args:
        dt, A, C: as in `ssd_scan`.
        state: the state after this part.
        shared: the part.
    """
    parts = SharedRows(mesh=shared.mesh, bounds=tuple(range(len(shared.bounds))))
    log_decay = (dt.double() * A.double()).cumsum(dim=1)  # [B, T, heads], from the beginning of the part
    before = state_from_parts(parts.gather(state.unsqueeze(1)), parts.gather(log_decay[:, -1:]), shared.part)
    return torch.einsum("bhpn,btn,bth->bthp", before, C, log_decay.to(C.dtype).exp())


@functools.cache
def _fused_scan() -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Returns `ssd_scan` by the kernels of `mamba_ssm`, which make their own chunks; None where it is not installed."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return None
    kernels = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")

    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.mamba_chunk_scan_combined(
            x.contiguous(),
            dt,
            A,
            B.unsqueeze(2).contiguous(),
            C.unsqueeze(2).contiguous(),
            chunk_size=256,
            initial_states=state,
            return_final_states=True,
        )

    return scan
