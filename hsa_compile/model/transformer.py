"""The language model: embedding, lower half, chunk encoder, upper half, output; one config describes each variant."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.config import AUTO, ModelConfig
from hsa_compile.model.layer import Cache, Layer, Piece
from hsa_compile.model.layers.basic import RMSNorm, ShortConvolution, kernel_dtype, rope_angles, traced
from hsa_compile.model.layers.exchange import SharedRows, share_rows
from hsa_compile.model.layers.hs_attention import ChunkEncoder, EncodedChunks, Selection, SequenceMemory
from hsa_compile.model.layers.mamba2 import Mamba2
from hsa_compile.model.layers.moe import MoE
from hsa_compile.model.layers.picked_chunks import ChunkTraffic


class HSATransformer(nn.Module):
    """A decoder whose upper half reads a memory made of its lower half's output (arXiv 2511.23319).

    `forward` is for training and one-shot evaluation; `inference.extend` and `inference.prefill` read texts of any
    length piece by piece.

    Args:
        config: the sizes and the variant of the model.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        self.context_mesh: DeviceMesh | None = None
        self.chunk_exchange = AUTO
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        has_window = config.embedding_window > 1
        self.convolution = ShortConvolution(config.dim, config.embedding_window) if has_window else None
        self.landmark_token = nn.Parameter(torch.zeros(config.dim)) if config.has_landmark_tokens else None
        layers = [Layer(config, spec, index) for index, spec in enumerate(config.layers)]
        self.lower = nn.ModuleList(layers[: config.num_lower_layers])
        self.chunk_encoder = ChunkEncoder(config) if config.has_memory else None
        self.upper = nn.ModuleList(layers[config.num_lower_layers :])
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew: normal with `init_std`, or 0.2 (convolution); norms 1, biases and pooling 0."""
        std = self.config.init_std
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, ShortConvolution):
                nn.init.normal_(module.weight, std=0.2)  # see docs/results.md, "Earlier recipes"
            elif isinstance(module, MoE | Mamba2):
                module.reset_parameters(std)
            elif isinstance(module, ChunkEncoder) and module.cls is not None:
                nn.init.normal_(module.cls, std=std)
        if self.chunk_encoder is not None and self.chunk_encoder.token_proj is not None:
            nn.init.zeros_(self.chunk_encoder.token_proj.weight)
        if self.landmark_token is not None:
            nn.init.normal_(self.landmark_token, std=std)

    @property
    def device(self) -> torch.device:
        """The device on which the weights are."""
        return self.embedding.weight.device

    def forward(
        self, tokens: Tensor, *, noise_seed: int | None = None, selections: list[Selection] | None = None
    ) -> Tensor:
        """Returns the logits of the next token at every position of whole texts.

        Args:
            tokens: `[B, T]` integers below `V`. Texts may end in padding, which changes nothing before it.
            noise_seed: seed of the Gumbel noise on selection, 0 … 2⁶³ − 1. If None, it is drawn from PyTorch's
                generator in training where the config asks for noise; otherwise there is none.
            selections: a list that is filled with what each retrieval chose.

        Returns:
            `[B, T, V]`.

        Raises:
            InvalidArgument: tokens have another shape or dtype.
        """
        return self.logits(self.hidden(tokens, noise_seed=noise_seed, selections=selections))

    def hidden(
        self,
        tokens: Tensor,
        *,
        noise_seed: int | None = None,
        selections: list[Selection] | None = None,
        in_batch_memory: bool = False,
        sources: Tensor | None = None,
        outputs: list[Tensor] | None = None,
    ) -> Tensor:
        """Returns the normalised output of the last layer `[B, T, dim]`, from which `logits` are made.

        The arguments are those of `forward`. With `in_batch_memory` each text also sees the chunks of all others: see
        `SequenceMemory`. With `sources [B, T]`, where the token stands that is copied after each one, selections have
        their losses, except in DRT, whose tokens do not choose for themselves. The list `outputs` is filled with the
        embeddings and the output of each layer. Where a `context_mesh` of processes shares each text, all get the same
        tokens, and each returns the output at its own part of them, `own_text`.
        """
        shared, own = self.shared_rows(tokens.shape[1]), self.own_text(tokens.shape[1])
        start = 0 if shared is None else shared.start
        begin = max(0, own.start - self.config.embedding_window + 1)
        x = self.with_tokens_before(self.embed(tokens[:, begin : own.stop]))[:, own.start - begin :]
        if outputs is not None:
            outputs.append(x)
        text = None
        if self.landmark_token is not None:
            x, text = self.with_landmark_tokens(x, start)
        if noise_seed is None and self.training and self.config.selection_noise and self.config.has_memory:
            noise_seed = int(torch.randint(2**63 - 1, ()))
        piece = self.piece([start] * x.shape[0], x, shared)
        x, _ = self.run(self.lower, x, piece, outputs=outputs)
        memory = None
        if self.chunk_encoder is not None:
            memory = self._memory(x, shared, in_batch_memory)
        sources = None if sources is None else sources[:, own]
        upper = replace(piece, memory=memory, noise_seed=noise_seed, sources=sources)
        x, _ = self.run(self.upper, x, upper, selections=selections, outputs=outputs)
        if outputs is not None and text is not None:
            outputs[1:] = [output[:, text] for output in outputs[1:]]
        return self.norm(x if text is None else x[:, text])

    def logits(self, hidden: Tensor) -> Tensor:
        """Turns `hidden [..., dim]` into logits `[..., V]`."""
        with traced("output"):
            if self.output is not None:
                return self.output(hidden)
            return nn.functional.linear(hidden, self.embedding.weight)

    def embed(self, tokens: Tensor) -> Tensor:
        """Looks up the embeddings `[B, T, dim]` of `tokens [B, T]`; what is embedded already is returned.

        Raises:
            InvalidArgument: tokens have another shape or dtype.
        """
        if tokens.dim() == 3 and tokens.is_floating_point() and tokens.shape[2] == self.config.dim:
            return tokens
        if tokens.dim() != 2:
            raise InvalidArgument(f"tokens have shape {list(tokens.shape)}; [B, T] is needed")
        if tokens.dtype not in (torch.int32, torch.int64, torch.uint8):
            raise InvalidArgument(f"tokens have dtype {tokens.dtype}; int64, int32 or uint8 is needed")
        return self.embedding(tokens.to(torch.int64) if tokens.dtype == torch.uint8 else tokens)

    def with_tokens_before(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """Adds to each embedding those of the tokens before it, as far as `embedding_window` reaches.

        Args:
            x: `[B, T, dim]`, the embeddings of tokens.
            before: `[B, embedding_window - 1, dim]`, those of the tokens before; None at the beginning of a text.
        """
        if self.convolution is None:
            return x
        if before is None:
            before = x.new_zeros(x.shape[0], self.config.embedding_window - 1, x.shape[2])
        return self.convolution(x, before)

    def with_landmark_tokens(self, x: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Puts DRT's landmark token behind each C − 1 tokens of text.

        Args:
            x: `[B, T, dim]`, the embedded text.
            position: where its first token stands; landmark tokens count.

        Returns:
            `[B, T', dim]`, and `[T]`, the places of the text in it.
        """
        assert self.landmark_token is not None
        per_chunk = self.config.chunk_size - 1
        start = position - position // self.config.chunk_size  # tokens of text before
        count = start + torch.arange(x.shape[1] + 1, device=x.device)
        place = count + count // per_chunk - position
        text, length = place[:-1], int(place[-1])
        filled = self.landmark_token.to(x.dtype).expand(x.shape[0], length, -1)
        return filled.index_copy(1, text, x), text

    def own_text(self, length: int) -> slice:
        """Returns which tokens of texts of a length this process computes: all, unless a `context_mesh` shares them."""
        shared = self.shared_rows(length)
        if shared is None:
            return slice(0, length)
        start, end = (place - place // self.config.chunk_size for place in (shared.start, shared.end))
        return slice(start, end) if self.landmark_token is not None else slice(shared.start, shared.end)

    def shared_rows(self, length: int) -> SharedRows | None:
        """Returns how processes share texts of `length` tokens, None if they do not; DRT's landmark tokens count."""
        if self.context_mesh is None:
            return None
        C = self.config.chunk_size
        places = length + length // (C - 1) if self.landmark_token is not None else length
        return share_rows(self.context_mesh, places, C)

    def piece(self, positions: Sequence[int], x: Tensor, shared: SharedRows | None = None) -> Piece:
        """Says where `x [B, T, dim]` lies, whose rows begin at `positions`, with its RoPE."""
        starts = list(positions)
        first = torch.tensor(starts[:1] if len(set(starts)) <= 1 else starts, device=x.device)
        places = first[:, None] + torch.arange(x.shape[1], device=x.device)
        rope = rope_angles(places, self.config.head_dim, self.config.rope_theta, x.dtype)
        return Piece(positions=starts, rope=rope, shared=shared)

    def run(
        self,
        layers: nn.ModuleList,
        x: Tensor,
        piece: Piece,
        caches: Sequence[Cache | None] | None = None,
        selections: list[Selection] | None = None,
        outputs: list[Tensor] | None = None,
    ) -> tuple[Tensor, list[Cache | None]]:
        """Runs `x [B, T, dim]` through the layers of one half; where caches are given, it also returns the new ones."""
        selection: Selection | None = None
        after: list[Cache | None] = []
        for i, layer in enumerate(layers):
            with traced(f"layer {layer.index}"):
                if self.checkpoint_activations and self.training:
                    x, selection, _ = checkpoint(layer, x, piece, selection, use_reentrant=False)
                else:
                    x, selection, cache = layer(x, piece, selection, caches[i] if caches is not None else None)
                    if caches is not None:
                        after.append(cache)
            if selection is not None and not _is_read(layers[i + 1 :]):
                selection = replace(selection, fetched=None)  # these chunks need not stay until the backward pass
            if selections is not None and layer.retrieval is not None and selection is not None:
                selections.append(replace(selection, fetched=None))
            if outputs is not None:
                outputs.append(x)
        return x, after

    def empty_caches(self, layers: nn.ModuleList, batch: int) -> list[Cache | None]:
        """Returns the caches of layers before the first token; None for a layer without a mixer."""
        like = self.embedding.weight.detach()
        return [layer.empty_cache(batch, like) for layer in layers]  # type: ignore[operator]

    def _memory(self, x: Tensor, shared: SharedRows | None, in_batch: bool) -> SequenceMemory:
        """Encodes the whole chunks of `x [B, T, dim]`, and gathers of other processes' ones what layers will need."""
        assert self.chunk_encoder is not None
        C = self.config.chunk_size
        num_chunks = x.shape[1] // C
        with traced("chunk encoder"):
            own: EncodedChunks = self.chunk_encoder(x[:, : num_chunks * C].unflatten(1, (num_chunks, C)))
        if shared is None:
            return SequenceMemory(own, in_batch=in_batch)
        chunks = shared.in_units(C)  # once for all layers above, as is the way back of their gradients
        k = own.k.to(kernel_dtype(own.k))  # normalised in float32, which would send twice as much
        landmarks = chunks.gather(own.landmarks)
        traffic = ChunkTraffic.of(  # the same in all processes that share the rows
            self.config,
            parts=shared.mesh.size(),
            rows=x.shape[0],
            places=shared.bounds[-1],
            forwards=2 if self.training and self.checkpoint_activations else 1,
            backwards=int(torch.is_grad_enabled()),
            in_batch=in_batch,
        )
        if traffic.travels(self.chunk_exchange):
            here = EncodedChunks(k=k, v=own.v, landmarks=landmarks)
            return SequenceMemory(here, in_batch=in_batch, owners=chunks)
        whole = EncodedChunks(k=chunks.gather(k), v=chunks.gather(own.v), landmarks=landmarks)
        return SequenceMemory(whole, in_batch=in_batch)


def _is_read(layers: nn.ModuleList) -> bool:
    """Says whether some of these layers read chunks before one of them chooses anew."""
    for layer in layers:
        if layer.retrieval is not None or layer.memory_attention is not None:
            return layer.retrieval is None
    return False


def empty_model(config: ModelConfig) -> HSATransformer:
    """Makes a model on the meta device: shapes without values, for counting or for weights from a file."""
    with torch.device("meta"), _WithoutInitialization():
        return HSATransformer(config)


class _WithoutInitialization(TorchFunctionMode):
    """Leaves tensors as `torch.nn.init` finds them, since drawing on the meta device imports `torch._dynamo`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))
