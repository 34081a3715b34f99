"""One layer of the model: a mixer of tokens, then the memory, then an MLP, as its `LayerSpec` says."""

from dataclasses import dataclass

from torch import Tensor, nn

from hsa_compile.model.config import LayerSpec, ModelConfig
from hsa_compile.model.layers.attention import FullAttention, FullCache
from hsa_compile.model.layers.basic import RMSNorm, SwiGLU, traced
from hsa_compile.model.layers.exchange import SharedRows
from hsa_compile.model.layers.hs_attention import HSAttention, Memory, Retrieval, Selection, SequenceMemory
from hsa_compile.model.layers.mamba2 import Mamba2, Mamba2State
from hsa_compile.model.layers.moe import MoE
from hsa_compile.model.layers.window_attention import WindowAttention, WindowCache

Cache = WindowCache | FullCache | Mamba2State


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Says where the piece of text that runs through the layers lies in its texts.

    Attributes:
        positions: where the first token of each row stands in its text.
        rope: cosines and sines `[B or 1, T, head_dim / 2]`.
        num_past: `[B]`, how many tokens the caches hold; None if the caches are full, or if there are none.
        num_valid: `[B]`, how many tokens of a row are no padding; None if all are.
        memory: the memory to retrieve from; None below it and in baselines.
        noise_seed: the seed of the Gumbel noise in training, or None for no noise.
        carried: for DRT, by layer: what was chosen for the next token. It is filled in; None in training.
        shared: which part of the rows this process computes, where several share them in training; None if it has all.
        sources: `[B, T]`, where the token stands that is copied after each one, −1 for none; for a loss in training.
    """

    positions: list[int]
    rope: tuple[Tensor, Tensor]
    num_past: Tensor | None = None
    num_valid: Tensor | None = None
    memory: Memory | None = None
    noise_seed: int | None = None
    carried: dict[int, Selection] | None = None
    shared: SharedRows | None = None
    sources: Tensor | None = None


class Layer(nn.Module):
    """A residual layer: a mixer, then retrieval and attention to the memory, then an MLP, as far as its spec has them.

    Args:
        config: the config of the model that the layer belongs to.
        spec: what this layer holds.
        index: the layer's number, counted from the bottom.
    """

    def __init__(self, config: ModelConfig, spec: LayerSpec, index: int) -> None:
        super().__init__()
        self.index, self.bypass = index, config.bypass
        self.has_landmark_tokens = config.has_landmark_tokens
        self.mixer_norm = RMSNorm(config.dim, config.norm_eps) if spec.mixer != "none" else None
        self.mixer, self.mixer_name = _mixer(config, spec), f"{spec.mixer} mixer"
        self.retrieval = Retrieval(config) if spec.retrieves else None
        self.memory_attention = HSAttention(config) if spec.reads_memory else None
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps) if spec.mlp != "none" else None
        self.mlp = _mlp(config, spec)

    def forward(
        self, x: Tensor, piece: Piece, selection: Selection | None = None, cache: Cache | None = None
    ) -> tuple[Tensor, Selection | None, Cache | None]:
        """Runs a piece through the layer.

        Args:
            x: `[B, T, dim]`.
            piece: what is the same for all layers.
            selection: what the last layer that retrieved has chosen.
            cache: the mixer's cache; None in training.

        Returns:
            `[B, T, dim]`, the selection for the layers above, and the cache after this piece.
        """
        if self.mixer_norm is not None:
            with traced(self.mixer_name):
                y, cache = self._mix(self.mixer_norm(x), piece, cache)
            x = x + y
        if self.retrieval is not None:
            with traced("retrieval"):
                selection = self._retrieve(self.retrieval, x, piece)
        read = None
        if self.memory_attention is not None:
            assert piece.memory is not None
            assert selection is not None
            with traced("memory attention"):
                read = self.memory_attention(x, piece.memory, selection)
            if not self.bypass:
                x, read = x + read, None
        if self.mlp is not None and self.mlp_norm is not None:
            with traced("MLP"):
                x = x + self.mlp(self.mlp_norm(x if read is None else x + read))
        return x, selection, cache

    def empty_cache(self, batch: int, like: Tensor) -> Cache | None:
        """Returns the mixer's cache before the first token, in dtype and device like `like`; None without a mixer."""
        if isinstance(self.mixer, Mamba2):
            return self.mixer.initial_state(batch, like)
        if isinstance(self.mixer, WindowAttention | FullAttention):
            return self.mixer.empty_cache(batch, like)
        return None

    def _mix(self, x: Tensor, piece: Piece, cache: Cache | None) -> tuple[Tensor, Cache | None]:
        if isinstance(self.mixer, Mamba2):
            y, state = self.mixer(x, cache, piece.num_valid, piece.shared)
            return y, state if cache is not None else None
        if isinstance(self.mixer, WindowAttention):
            return self.mixer(x, piece.rope, cache, piece.num_past, piece.num_valid, piece.shared)
        assert self.mixer is not None
        return self.mixer(x, piece.rope, cache, piece.num_past, piece.num_valid)

    def _retrieve(self, retrieval: Retrieval, x: Tensor, piece: Piece) -> Selection:
        assert piece.memory is not None
        noise_seed = None if piece.noise_seed is None else (piece.noise_seed + self.index) % 2**63
        if not self.has_landmark_tokens:
            chosen = retrieval(x, piece.memory, piece.positions, noise_seed, piece.sources)
            return _with_chunks(chosen, piece.memory)
        carried = piece.carried.get(self.index) if piece.carried is not None else None
        now, after = retrieval.once_a_chunk(x, piece.memory, piece.positions[0], carried, noise_seed, piece.shared)
        if piece.carried is not None:
            piece.carried[self.index] = after
        return _with_chunks(now, piece.memory)


def _with_chunks(selection: Selection, memory: Memory) -> Selection:
    """Adds the chunks of a selection to it if they lie with several processes, which only training knows."""
    return memory.fetch(selection) if isinstance(memory, SequenceMemory) else selection


def _mixer(config: ModelConfig, spec: LayerSpec) -> nn.Module | None:
    if spec.mixer == "window":
        return WindowAttention(config)
    if spec.mixer == "full":
        return FullAttention(config)
    if spec.mixer == "mamba":
        return Mamba2(
            config.dim,
            state_dim=config.state_dim,
            head_dim=config.mamba_head_dim,
            expand=config.mamba_expand,
            norm_eps=config.norm_eps,
        )
    return None


def _mlp(config: ModelConfig, spec: LayerSpec) -> nn.Module | None:
    if spec.mlp == "moe":
        return MoE(
            config.dim,
            num_experts=config.num_experts,
            experts_per_token=config.experts_per_token,
            expert_dim=config.expert_dim,
            num_shared_experts=config.num_shared_experts,
        )
    return SwiGLU(config.dim, config.ffn_dim) if spec.mlp == "dense" else None
