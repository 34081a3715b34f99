"""Reading a long haystack once; each sample then costs only its edits and the question, with nothing lost.

The lower half's output at a token depends on no more than `lower layers · (window − 1)` tokens before it, so an edit
changes few chunks of the memory: they are read again and put in their places. The upper half runs over the last
tokens alone, as in `inference.prefill`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hsa_compile.model.data.tokenizer import TokenArray
from hsa_compile.model.inference.inference import ModelState, prefill, upper_reach
from hsa_compile.model.inference.snapshot import rewind, snapshot
from hsa_compile.model.tasks.sample import TaskPlan, TaskSample
from hsa_compile.model.transformer import HSATransformer

ChunkRange = tuple[int, int]  # the first chunk, and one past the last


class EditedReading:
    """A haystack in a model's memory, in which samples replace what they change for as long as they are asked.

    Args:
        model: a model in evaluation mode, with a `resume_position` for the samples.
        haystack: `[length]` tokens.
        prompt_length: how many tokens every sample has before its first answer, or less.
        state: the empty state of one text, which is filled.
    """

    def __init__(self, model: HSATransformer, haystack: TokenArray, prompt_length: int, state: ModelState) -> None:
        position = resume_position(model, prompt_length)
        assert position, "the samples are too short to be edited, or the model remembers too much"
        self._model, self._state, self._position = model, state, position
        self.num_read = model.config.text_length(position)  # bytes before those that are read for each sample
        if state.memory is not None:
            prefill(model, _tokens(haystack[: self.num_read]), state)

    @contextmanager
    def sample(self, sample: TaskSample) -> Iterator[ModelState]:
        """Yields the state after the first `num_read` bytes of a sample; afterwards the haystack is in memory again."""
        memory = self._state.memory
        kept: list[tuple[int, tuple[Tensor, Tensor, Tensor]]] = []
        before = snapshot(self._state)
        try:
            if memory is not None:
                for first, last in edited_chunks(self._model, sample.plan, self._position):
                    kept.append((first, memory.read(0, first, last)))
                    self._read_again(sample.tokens, first, last)
            yield self._resume(sample.tokens)
        finally:
            rewind(self._state, before)
            if memory is not None:
                for first, chunks in kept:
                    memory.overwrite(0, first, *chunks)

    @torch.no_grad()
    def _read_again(self, tokens: TokenArray, first: int, last: int) -> None:
        model, C = self._model, self._model.config.chunk_size
        assert model.chunk_encoder is not None
        assert self._state.memory is not None
        x, begin = self._embed(tokens, first * C, last * C)
        x, _ = model.run(model.lower, x, model.piece([begin], x))
        encoded = model.chunk_encoder(x[0, first * C - begin :].unflatten(0, (last - first, C)))
        self._state.memory.overwrite(0, first, encoded.k, encoded.v, encoded.landmarks)

    @torch.no_grad()
    def _resume(self, tokens: TokenArray) -> ModelState:
        model = self._model
        caches = model.empty_caches(model.lower, 1)
        x, begin = self._embed(tokens, self._position, self._position)
        size = model.config.embedding_window - 1
        newest = model.embed(_tokens(tokens[max(0, self.num_read - size) : self.num_read]).to(model.device))
        if x.shape[1]:
            piece = replace(model.piece([begin], x), num_past=torch.zeros(1, dtype=torch.int64, device=x.device))
            _, caches = model.run(model.lower, x, piece, caches)
        return ModelState(
            positions=[self._position],
            lower=caches,
            upper=model.empty_caches(model.upper, 1),
            num_upper_past=[0],
            newest=F.pad(newest, (0, 0, size - newest.shape[1], 0)),
            pending=torch.zeros_like(self._state.pending),  # a chunk begins here
            memory=self._state.memory,
        )

    def _embed(self, tokens: TokenArray, start: int, end: int) -> tuple[Tensor, int]:
        """Embeds positions from early enough on to be exact at `start`, up to `end`; returns them and where they begin.

        Both are multiples of the chunk size.
        """
        model, config = self._model, self._model.config
        begin = max(0, start - config.lower_reach) // config.chunk_size * config.chunk_size
        text = tokens[config.text_length(begin) : config.text_length(end)]
        x = model.with_tokens_before(model.embed(_tokens(text).to(model.device)))
        if config.has_landmark_tokens:
            x, _ = model.with_landmark_tokens(x, begin)
        assert x.shape[1] == end - begin
        return x, begin


def resume_position(model: HSATransformer, prompt_length: int) -> int | None:
    """Returns where in the layers each sample is taken up: a chunk's beginning from which the answers are exact.

    Args:
        model: the model that reads.
        prompt_length: how many tokens come before the first answer, or less.

    Returns:
        the position; None where a sample must be read whole, since it is short or some layer remembers without end.
    """
    config, reach = model.config, upper_reach(model)
    if reach is None or any(spec.mixer != "window" for spec in config.layers):
        return None
    end = config.layer_position(prompt_length - 1) + 1
    return max(0, end - reach) // config.chunk_size * config.chunk_size or None


def edited_chunks(model: HSATransformer, plan: TaskPlan, end: int) -> list[ChunkRange]:
    """Returns the chunks before position `end` whose keys and values a sample's needles can change, ascending.

    Args:
        model: the model that reads.
        plan: the plan of the sample.
        end: a position that is a multiple of the chunk size.
    """
    config = model.config
    ranges: list[ChunkRange] = []
    for edit in plan.edits:  # the question is among them, which may begin before `end`
        newest = config.layer_position(edit.end - 1) + config.lower_reach
        first = config.layer_position(edit.start) // config.chunk_size
        last = min(newest // config.chunk_size + 1, end // config.chunk_size)
        if first >= last:
            continue
        if ranges and first <= ranges[-1][1]:
            first, last = ranges[-1][0], max(last, ranges.pop()[1])
        ranges.append((first, last))
    return ranges


def num_reread(model: HSATransformer, num_needles: int, needle: int, length: int, prompt_length: int) -> int:
    """Returns how many tokens run through the lower half for a sample once its haystack was read; a little too many.

    Args:
        model: the model that reads.
        num_needles: how many needles the sample has.
        needle: the size of the largest.
        length: how many tokens the sample has.
        prompt_length: as in `resume_position`, which must not be None.
    """
    position = resume_position(model, prompt_length)
    assert position is not None
    config = model.config
    reach, C = config.lower_reach, config.chunk_size
    tail = config.layer_position(length) - position + reach
    edit = needle + 2 * reach + 2 * C
    return tail + (num_needles * edit if config.has_memory else 0)


def _tokens(text: TokenArray) -> Tensor:
    # A haystack is read-only, about which PyTorch warns; and of unsigned types it computes with bytes alone.
    return torch.from_numpy(text.astype(np.uint8 if text.dtype == np.uint8 else np.int64))[None]
