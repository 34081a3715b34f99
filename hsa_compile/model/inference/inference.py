"""Reading texts of any length: the state between pieces, extending it, and the exact fast prefill."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.inference.parts import Parts, Start, share_text
from hsa_compile.model.layer import Cache, Piece
from hsa_compile.model.layers.basic import traced
from hsa_compile.model.layers.hs_attention import Selection
from hsa_compile.model.layers.window_attention import appended
from hsa_compile.model.memory.memory import ChunkMemory
from hsa_compile.model.memory.shared import SharedMemory
from hsa_compile.model.transformer import HSATransformer

PIECE = 4096  # how many tokens prefill reads at once


@dataclass(slots=True, kw_only=True)
class ModelState:
    """All that a model keeps of the texts it has read; `new_state` makes it, reading on changes it in place.

    Attributes:
        positions: how many tokens of each row were read; landmark tokens of the model's own count.
        lower, upper: caches of the layers of both halves.
        num_upper_past: how many tokens of each row are in the upper caches.
        newest: `[B, embedding_window − 1, dim]`, the embeddings of the newest tokens.
        pending: `[B, C − 1, dim]`, the newest outputs of the lower half, with the incomplete chunk at their end.
        memory: the chunks that are complete, of which a process may hold a share; None in baselines.
        carried: DRT's selections for the next token, by layer.
        rows: the states of the rows in DRT, which reads each row on its own: landmark tokens come at different times.
            They hold all that was read; the other fields are then what the first row had when the state was made.
    """

    positions: list[int]
    lower: list[Cache | None]
    upper: list[Cache | None]
    num_upper_past: list[int]
    newest: Tensor
    pending: Tensor
    memory: ChunkMemory | SharedMemory | None
    carried: dict[int, Selection] = field(default_factory=dict)
    rows: list["ModelState"] | None = None


def new_state(
    model: HSATransformer,
    batch: int = 1,
    *,
    memory: str = "device",
    directory: Path | None = None,
    memory_dtype: torch.dtype | None = None,
    mesh: DeviceMesh | None = None,
) -> ModelState:
    """Makes the state before the first token.

    Args:
        model: the model that will read.
        batch: how many texts are read at once.
        memory: where chunk keys and values lie: `device`, `host` (pinned if there is a GPU) or `disk`.
        directory: where the files of `disk` are made.
        memory_dtype: dtype of chunk keys and values; the weights' if None. Half precision is rounded once, when stored.
        mesh: processes that read the texts together, in one dimension; None for this one alone. Each holds a share of
            the chunks, makes the same calls with the same texts, and gets the same logits.

    Raises:
        InvalidArgument: batch or memory is not allowed, or the model has layers of full attention and there is a mesh.
    """
    if batch < 1:
        raise InvalidArgument(f"batch = {batch} must be at least 1")
    config, weight = model.config, model.embedding.weight.detach()
    if mesh is not None and config.variant == "full":
        raise InvalidArgument(
            "variant 'full' has no memory that several processes could share: each of its layers keeps all tokens"
        )
    if config.has_landmark_tokens and batch > 1:
        places = [directory / f"row{i}" if directory else None for i in range(batch)]
        rows = [
            new_state(model, memory=memory, directory=place, memory_dtype=memory_dtype, mesh=mesh) for place in places
        ]
        return replace(rows[0], rows=rows)
    chunks: ChunkMemory | SharedMemory | None = None
    if config.has_memory:
        own = ChunkMemory(
            batch=batch,
            num_kv_heads=config.memory_kv_heads,
            head_dim=config.memory_head_dim,
            chunk_size=config.chunk_size,
            retrieval_dim=config.retrieval_dim,
            landmarks_per_chunk=config.landmarks_per_chunk,
            dtype=memory_dtype or weight.dtype,
            landmark_dtype=weight.dtype,
            device=weight.device,
            placement=memory,
            directory=directory,
        )
        chunks = own if mesh is None else SharedMemory(own, mesh)
    return ModelState(
        positions=[0] * batch,
        lower=model.empty_caches(model.lower, batch),
        upper=model.empty_caches(model.upper, batch),
        num_upper_past=[0] * batch,
        newest=weight.new_zeros(batch, config.embedding_window - 1, config.dim),
        pending=weight.new_zeros(batch, config.chunk_size - 1, config.dim),
        memory=chunks,
    )


@torch.no_grad()
def extend(model: HSATransformer, tokens: Tensor, state: ModelState, num_valid: Sequence[int] | None = None) -> Tensor:
    """Reads on; returns the logits at each new token, given all that was read before.

    Args:
        model: a model in evaluation mode.
        tokens: `[B, T]`, or their embeddings `[B, T, dim]`; shorter rows end in padding.
        state: the state to read on from; it is changed in place.
        num_valid: how many tokens of each row are no padding, 0 … T; None if all are.

    Returns:
        `[B, T, V]`; what stands at padding means nothing.

    Raises:
        InvalidArgument: tokens do not fit the state.
    """
    valid = _valid(tokens, state, num_valid)
    if state.rows is not None:
        return _by_rows(
            [
                extend(model, tokens[b : b + 1, :n], row)
                for b, (n, row) in enumerate(zip(valid, state.rows, strict=True))
            ],
            tokens.shape[1],
        )
    if max(valid) == 0:
        return model.embedding.weight.new_zeros(*tokens.shape[:2], model.config.vocab_size)
    x, text = _embed(model, tokens, state, valid)
    inserted = x.shape[1] - tokens.shape[1]
    valid = [n + inserted for n in valid]  # landmark tokens come one row at a time, where nothing is padding
    start = list(state.positions)
    x = _read_lower(model, x, state, valid, state.positions, state.memory)
    x = _read_upper(model, x, state, start, valid)
    return model.logits(model.norm(x if text is None else x[:, text]))


@torch.no_grad()
def prefill(
    model: HSATransformer,
    tokens: Tensor,
    state: ModelState,
    lengths: Sequence[int] | None = None,
    *,
    piece: int = PIECE,
) -> Tensor:
    """Reads long texts fast: the upper half runs over the last tokens alone, and nothing is lost by it.

    The memory comes from the lower half, so that runs over all tokens, piece by piece. An upper window layer sees
    `window − 1` tokens back: the last output, and the caches for what follows, depend on no more than the last
    `upper layers · (window − 1) + 1` tokens of the upper half. Models whose upper half remembers more (`full`,
    `ramba`) read all tokens through both halves. Processes that share the memory each read a part of a long text, and
    then all of them its end.

    Args:
        model: a model in evaluation mode.
        tokens: as in `extend`, on any device.
        state: the state to read on from; it is changed in place.
        lengths: how many tokens of each row are no padding, at least 1; None if all are.
        piece: how many tokens are read at once.

    Returns:
        `[B, V]`, the logits at the last token of each row, as `extend` gives them for the same tokens.

    Raises:
        InvalidArgument: tokens do not fit the state, or a row is empty.
    """
    valid = _valid(tokens, state, lengths)
    if min(valid) < 1:
        raise InvalidArgument(f"lengths = {valid}: prefill needs one token at least in each row")
    if piece < 1:
        raise InvalidArgument(f"piece = {piece} must be at least 1")
    if state.rows is not None:
        rows = zip(valid, state.rows, strict=True)
        return torch.cat([prefill(model, tokens[b : b + 1, :n], row, piece=piece) for b, (n, row) in enumerate(rows)])
    tail = upper_reach(model)
    if tail is None:
        return _last_of_pieces(model, tokens, state, valid, piece)
    return _lower_then_tail(model, tokens, state, valid, piece, tail)


def upper_reach(model: HSATransformer) -> int | None:
    """Returns how many of the newest tokens the upper half must read for exact output and caches; None for all."""
    config = model.config
    mixers = {spec.mixer for spec in config.layers[config.num_lower_layers :]}
    if mixers != {"window"}:
        return None
    reach = config.num_upper_layers * (config.window - 1) + 1
    if config.has_landmark_tokens:  # a chunk's selection comes from the last token of the chunk before
        reach += config.num_groups * config.chunk_size
    return reach


def _last_of_pieces(model: HSATransformer, tokens: Tensor, state: ModelState, valid: list[int], piece: int) -> Tensor:
    last = tokens.new_zeros(tokens.shape[0], model.config.vocab_size, dtype=model.embedding.weight.dtype)
    last = last.to(model.device)
    for start in range(0, max(valid), piece):
        here = [min(max(n - start, 0), piece) for n in valid]
        logits = extend(model, tokens[:, start : start + max(here)].to(model.device), state, here)
        for b, n in enumerate(here):
            if n:
                last[b] = logits[b, n - 1]
    return last


def _lower_then_tail(
    model: HSATransformer, tokens: Tensor, state: ModelState, valid: list[int], piece: int, tail: int
) -> Tensor:
    begin, none, memory = list(state.positions), [0] * len(valid), state.memory
    start = Start(positions=begin, text=none, origins=none)
    if isinstance(memory, SharedMemory):
        parts = share_text(model.config, begin, valid, memory.rank, memory.mesh.size(), tail)
        if parts is not None:
            _read_part(model, tokens, state, memory, parts, piece)
            memory, start, state.positions = None, parts.end, list(parts.end.positions)
    kept = model.embedding.weight.new_zeros(len(valid), tail, model.config.dim)
    for x, here in _read_text(model, tokens, state, start, valid, piece, memory):
        kept = appended(kept, x, _count(here, x))
    # What is new to the upper half, at most the tail, moved to the front of each row.
    news = [after - before for after, before in zip(state.positions, begin, strict=True)]
    num_new = [min(tail, new) for new in news]
    order = (
        torch.arange(max(num_new), device=kept.device)[None] + tail - torch.tensor(num_new, device=kept.device)[:, None]
    )
    x = kept.gather(1, order.clamp(max=tail - 1)[:, :, None].expand(-1, -1, kept.shape[2]))
    # Where tokens were left out, the upper caches do not join on: they count as empty.
    state.num_upper_past = [0 if new > tail else past for new, past in zip(news, state.num_upper_past, strict=True)]
    if max(news) > tail:
        state.carried.clear()
    starts = [after - n for after, n in zip(state.positions, num_new, strict=True)]
    x = _read_upper(model, x, state, starts, num_new)
    last = torch.tensor(
        [_last_text(model, start, n) for start, n in zip(starts, num_new, strict=True)], device=x.device
    )
    return model.logits(model.norm(x[torch.arange(x.shape[0], device=x.device), last]))


def _read_text(
    model: HSATransformer, tokens: Tensor, state: ModelState, start: Start, ends: list[int], piece: int,
    memory: ChunkMemory | SharedMemory | None,
) -> Iterator[tuple[Tensor, list[int]]]:  # fmt: skip
    """Runs each row's new tokens up to `ends[b]` through the lower half; yields its outputs and how many are valid.

    Chunks that become complete go to `memory`; None where they are not wanted.
    """
    longest = max(end - first for first, end in zip(start.text, ends, strict=True))
    for done in range(0, longest, piece):
        firsts = [first + done for first in start.text]
        here = [min(max(end - first, 0), piece) for first, end in zip(firsts, ends, strict=True)]
        rows = tokens.new_zeros(len(here), max(here), *tokens.shape[2:])
        for b, (first, n) in enumerate(zip(firsts, here, strict=True)):
            rows[b, :n] = tokens[b, first : first + n]
        x, _ = _embed(model, rows.to(model.device), state, here)
        here = [n + x.shape[1] - max(here) for n in here]
        past = [position - origin for position, origin in zip(state.positions, start.origins, strict=True)]
        yield _read_lower(model, x, state, here, past, memory), here


def _read_part(
    model: HSATransformer, tokens: Tensor, state: ModelState, memory: SharedMemory, parts: Parts, piece: int
) -> None:
    """Reads this process's part of the new text into the memory; the state stays where it is."""
    reader = replace(state, positions=list(parts.early.positions), lower=list(state.lower))
    for _ in _read_text(model, tokens, reader, parts.early, parts.first, piece, None):
        pass
    for _ in _read_text(model, tokens, reader, replace(parts.early, text=parts.first), parts.last, piece, memory.own):
        pass
    memory.note(parts.num_chunks)


def _last_text(model: HSATransformer, start: int, count: int) -> int:
    """Returns the place of the last token that is text: before it, if that is a landmark token of the model's own."""
    ends_in_landmark = model.config.has_landmark_tokens and (start + count) % model.config.chunk_size == 0
    return count - 1 - ends_in_landmark


def _embed(model: HSATransformer, tokens: Tensor, state: ModelState, valid: list[int]) -> tuple[Tensor, Tensor | None]:
    embedded = model.embed(tokens)
    x = model.with_tokens_before(embedded, state.newest)
    state.newest = appended(state.newest, embedded, _count(valid, embedded))
    if model.landmark_token is None:
        return x, None
    return model.with_landmark_tokens(x, state.positions[0])


def _read_lower(
    model: HSATransformer, x: Tensor, state: ModelState, valid: list[int], past: list[int],
    memory: ChunkMemory | SharedMemory | None,
) -> Tensor:  # fmt: skip
    """Runs the lower half, whose caches hold `past` tokens, and adds the chunks that became complete to the memory."""
    piece = _piece(model, x, state.positions, past, valid)
    x, state.lower = model.run(model.lower, x, piece, state.lower)
    if model.config.has_memory:
        _remember(model, x, state, valid, memory)
    state.positions = [position + n for position, n in zip(state.positions, valid, strict=True)]
    return x


def _read_upper(model: HSATransformer, x: Tensor, state: ModelState, starts: list[int], valid: list[int]) -> Tensor:
    piece = _piece(model, x, starts, state.num_upper_past, valid)
    carried = state.carried if model.config.has_landmark_tokens else None
    piece = replace(piece, memory=state.memory, carried=carried)
    x, state.upper = model.run(model.upper, x, piece, state.upper)
    state.num_upper_past = [past + n for past, n in zip(state.num_upper_past, valid, strict=True)]
    return x


def _piece(model: HSATransformer, x: Tensor, starts: list[int], past: list[int], valid: list[int]) -> Piece:
    piece = model.piece(starts, x)
    grows = any(spec.mixer == "full" for spec in model.config.layers)
    num_past = _tensor(past, x) if grows or min(past) < model.config.window - 1 else None
    return replace(piece, num_past=num_past, num_valid=_count(valid, x))


def _remember(
    model: HSATransformer, x: Tensor, state: ModelState, valid: list[int], memory: ChunkMemory | SharedMemory | None
) -> None:
    """Encodes the chunks that the piece completes; `state.positions` is still where the piece begins."""
    assert model.chunk_encoder is not None
    C = model.config.chunk_size
    waiting = [position % C for position in state.positions]
    counts = [(w + n) // C for w, n in zip(waiting, valid, strict=True)]
    most = max(counts)
    if most and memory is not None:
        rows = torch.cat((state.pending, x), dim=1)
        first = C - 1 - _tensor(waiting, x)
        index = (first[:, None] + torch.arange(most * C, device=x.device)).clamp(max=rows.shape[1] - 1)
        chunks = rows.gather(1, index[:, :, None].expand(-1, -1, rows.shape[2])).unflatten(1, (most, C))
        with traced("chunk encoder"):
            encoded = model.chunk_encoder(chunks)
        memory.append(encoded.k, encoded.v, encoded.landmarks, counts)
    state.pending = appended(state.pending, x, _count(valid, x))


def _count(valid: list[int], x: Tensor) -> Tensor | None:
    """Returns valid tokens as the layers take them: None where nothing is padding."""
    return None if all(n == x.shape[1] for n in valid) else _tensor(valid, x)


def _tensor(values: list[int], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device)


def _by_rows(rows: list[Tensor], length: int) -> Tensor:
    padded = rows[0].new_zeros(len(rows), length, rows[0].shape[2])
    for b, row in enumerate(rows):
        padded[b, : row.shape[1]] = row[0]
    return padded


def _valid(tokens: Tensor, state: ModelState, num_valid: Sequence[int] | None) -> list[int]:
    batch = len(state.rows) if state.rows is not None else len(state.positions)
    if tokens.dim() not in (2, 3) or tokens.shape[0] != batch:
        raise InvalidArgument(f"tokens have shape {list(tokens.shape)}; [{batch}, T] is needed")
    valid = [tokens.shape[1]] * batch if num_valid is None else [int(n) for n in num_valid]
    if len(valid) != batch or not all(0 <= n <= tokens.shape[1] for n in valid):
        raise InvalidArgument(f"num_valid = {valid} must be {batch} numbers in 0 … {tokens.shape[1]}")
    return valid
