"""What `generate` of `transformers` keeps between two tokens: our chunk memory and caches behind its `Cache`."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.inference.generate import evaluating
from hsa_compile.model.inference.inference import ModelState, extend, new_state, prefill
from hsa_compile.model.inference.snapshot import take_rows
from hsa_compile.model.transformer import HSATransformer


class HSACache(transformers.Cache):
    """The texts that a model has read: a prompt is read once, and each new token costs the same at any length.

    `generate` makes one by itself. One that is made by hand goes on from a text that was read before, such as a saved
    reading, or keeps its memory in another place: `HSACache(model, new_state(model, memory="disk", directory=...))`.
    `copy.deepcopy` gives a cache that reads on by itself, without a copy of the chunks.

    Args:
        model: the model that reads, `.model` of `HSACompileForCausalLM`.
        state: what it has read, which the cache changes in place; None for nothing, in as many rows as then come.
    """

    def __init__(self, model: HSATransformer, state: ModelState | None = None) -> None:
        super().__init__(layers=[])
        self.state = state
        self._model = model
        lengths = [] if state is None else _text_lengths(model, state)
        self._length = max(lengths, default=0)
        self._padding = [self._length - length for length in lengths]

    def read(self, tokens: Tensor, mask: Tensor | None, *, only_last: bool) -> Tensor:
        """Reads on, in evaluation mode and without gradients.

        Args:
            tokens: `[B, T]` new tokens, or their embeddings `[B, T, dim]`.
            mask: `[B, past + T]`, 0 at padding before a text and 1 behind that; None if there is none.
            only_last: whether only the logits at the last token are needed, which long pieces make much faster.

        Returns:
            the logits at the new tokens `[B, T, V]`, or at the last `[B, 1, V]`.

        Raises:
            InvalidArgument: the mask has another shape, 0 behind the beginning of a text, or another beginning than
                before; or the number of texts is not that of the cache.
        """
        batch, num_new = tokens.shape[:2]
        if self.state is None:
            self.state, self._padding = new_state(self._model, batch), [0] * batch
        elif batch != self.batch_size:
            raise InvalidArgument(f"input_ids have {batch} rows; the cache holds {self.batch_size} texts")
        total = self._length + num_new
        padding = self._padding if mask is None else _left_padding(mask, batch, total)
        if [min(n, self._length) for n in padding] != [min(n, self._length) for n in self._padding]:
            raise InvalidArgument(
                f"attention_mask has {padding} zeros before its texts; the texts in the cache have {self._padding}"
            )
        skipped = [max(0, n - self._length) for n in padding]  # padding among the new tokens
        valid = [num_new - n for n in skipped]
        with evaluating(self._model):
            logits = self._logits(tokens, skipped, valid, only_last)
        self._length, self._padding = total, padding
        return logits

    def _logits(self, tokens: Tensor, skipped: list[int], valid: list[int], only_last: bool) -> Tensor:
        assert self.state is not None
        by = torch.tensor(skipped, device=tokens.device) if any(skipped) else None
        if by is not None:
            tokens = rolled(tokens, by)
        if only_last and tokens.shape[1] > 1 and min(valid) > 0:
            return prefill(self._model, tokens, self.state, valid)[:, None]
        logits = extend(self._model, tokens, self.state, valid)
        if by is not None:
            logits = rolled(logits, -by)
        return logits[:, -1:] if only_last else logits

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns how many tokens were read, padding before a text included."""
        return self._length

    @property
    def batch_size(self) -> int:
        """How many texts there are; −1 before the first token."""
        return len(self._padding) if self.state is not None else -1

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read."""
        return self.state is not None

    @property
    def is_croppable(self) -> bool:
        """Says that `crop` cannot take tokens back."""
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Refuses to forget tokens, since the layers' caches do not hold what they were before."""
        if tokens_to_remove:
            raise InvalidArgument(f"crop({tokens_to_remove}): this cache forgets no tokens; copy.deepcopy it before")

    def reset(self) -> None:
        """Forgets everything; the next texts have a memory on the model's device."""
        self.state, self._length, self._padding = None, 0, []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes row b what row `beam_idx[b]` was, as beam search asks."""
        self._take(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the texts of these rows."""
        self._take(torch.arange(self.batch_size, device=indices.device)[indices].tolist())  # it may be a mask

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each text so many times."""
        self._take([row for row in range(self.batch_size) for _ in range(repeats)])

    def __deepcopy__(self, memo: dict[int, object]) -> "HSACache":
        copied = HSACache(self._model)
        if self.state is not None:
            copied.state = take_rows(self._model, self.state, range(self.batch_size))
        copied._length, copied._padding = self._length, list(self._padding)
        return copied

    def _take(self, rows: Sequence[int]) -> None:
        if self.state is None or list(rows) == list(range(self.batch_size)):
            return
        self.state = take_rows(self._model, self.state, rows)
        self._padding = [self._padding[row] for row in rows]


def _text_lengths(model: HSATransformer, state: ModelState) -> list[int]:
    """Returns how many tokens of text each row has, without landmark tokens of the model's own."""
    positions = [row.positions[0] for row in state.rows] if state.rows is not None else state.positions
    if model.config.has_landmark_tokens:
        return [position - position // model.config.chunk_size for position in positions]
    return list(positions)


def _left_padding(mask: Tensor, batch: int, total: int) -> list[int]:
    """Returns how many zeros stand before each text; behind them a mask for a cache has nothing but ones."""
    first_tokens(mask, (batch, total))
    is_text = mask != 0
    empty = ~is_text.any(dim=1)
    if not bool((is_text[:, -1] | empty).all()):
        raise InvalidArgument("attention_mask ends in 0; with a cache, padding stands before a text and not behind it")
    return is_text.long().argmax(dim=1).masked_fill(empty, total).tolist()


def first_tokens(mask: Tensor, shape: Sequence[int]) -> Tensor | None:
    """Returns where each text of a batch begins.

    Args:
        mask: 1 at the text and 0 at padding.
        shape: `B, T`, the shape that the mask should have.

    Returns:
        `[B]`, or None if all texts begin at the first token.

    Raises:
        InvalidArgument: the mask has another shape, other values, or a 0 inside of a text.
    """
    if tuple(mask.shape) != tuple(shape):
        raise InvalidArgument(f"attention_mask has shape {list(mask.shape)}; {list(shape)} is needed")
    is_text = mask != 0
    begins = is_text & ~F.pad(is_text, (1, -1))
    if bool((begins.sum(dim=1) > 1).any()) or bool((is_text & (mask != 1)).any()):
        raise InvalidArgument(
            "attention_mask has 0 inside of a text, or values other than 0 and 1; allowed is one run of 1 in each row, "
            "with padding before or behind it"
        )
    return None if bool(is_text[:, 0].all()) else is_text.long().argmax(dim=1)


def rolled(x: Tensor, by: Tensor) -> Tensor:
    """Moves row b of `x [B, T, …]` left by `by[b]`; what leaves at the left comes in at the right."""
    index = (torch.arange(x.shape[1], device=x.device) + by[:, None].to(x.device)) % x.shape[1]
    return x.gather(1, index.view(*index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))
