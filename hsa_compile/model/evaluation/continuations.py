"""How likely a model finds continuations of texts, and what it writes itself; a text is read once for all of them."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hsa_compile.errors import NotFinite
from hsa_compile.model.data.tokenizer import TokenArray
from hsa_compile.model.evaluation.perplexity import LOGITS
from hsa_compile.model.evaluation.subject import Subject, num_rows, piece_of
from hsa_compile.model.inference.generate import Sampling, TextStream, stream
from hsa_compile.model.inference.inference import ModelState, extend, prefill, rewind, snapshot
from hsa_compile.model.transformer import HSATransformer

MAX_ROWS = 64  # the most texts of a batch, since many short ones would fill the memory with caches


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How likely a continuation is.

    Attributes:
        log_probability: the sum over its tokens, in nats.
        is_greedy: whether each of its tokens is the most likely one there.
    """

    log_probability: float
    is_greedy: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Branches:
    """A text and what may follow it.

    Attributes:
        context: `[T]` tokens of the text, at least one.
        continuations: what may follow, `[n]` tokens each, n from 0 on; at least one.
    """

    context: TokenArray
    continuations: tuple[TokenArray, ...]

    @property
    def longest(self) -> int:
        """How many tokens the text has with its longest continuation."""
        return len(self.context) + max(map(len, self.continuations))


def branches_of(pairs: Sequence[tuple[TokenArray, TokenArray]]) -> tuple[list[Branches], list[list[int]]]:
    """Puts pairs of context and continuation that share a context together.

    A continuation that is longer than its context stands alone: reading the context again costs less than waiting for
    others, since what stands alone shares a batch.

    Returns:
        the texts, and for each of them the pairs that its continuations come from.
    """
    groups: dict[tuple[bytes, int], list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        alone = number if len(continuation) > len(context) else -1
        groups.setdefault((context.tobytes(), alone), []).append(number)
    texts = [
        Branches(context=pairs[numbers[0]][0], continuations=tuple(pairs[number][1] for number in numbers))
        for numbers in groups.values()
    ]
    return texts, list(groups.values())


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yields which texts are read at once: those of like length, the longest first."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    while order:
        size = min(num_rows(lengths[order[0]]), MAX_ROWS)
        yield order[:size]
        order = order[size:]


@torch.no_grad()
def scores(subject: Subject, texts: Sequence[Branches]) -> list[list[Score]]:
    """Returns the score of each continuation of each text; all texts are read at once.

    Args:
        subject: the model that reads, with its tokenizer.
        texts: texts of like length.

    Raises:
        NotFinite: the model's logits are infinite or not a number.
    """
    model, state = subject.model, subject.new_state(len(texts))
    tokens, lengths = padded([text.context for text in texts])
    first = prefill(model, tokens, state, lengths, piece=piece_of(len(texts), model))
    point = snapshot(state)
    found: list[list[Score]] = [[] for _ in texts]
    for turn in range(max(len(text.continuations) for text in texts)):
        rewind(state, point)
        here = [text.continuations[turn : turn + 1] for text in texts]  # one each, or none
        rows = [each[0] if each else text.context[:0] for each, text in zip(here, texts, strict=True)]
        for of_text, each, score in zip(found, here, _follow(model, state, first, rows), strict=True):
            of_text += [score] * len(each)
    return found


def padded(rows: Sequence[TokenArray]) -> tuple[Tensor, list[int]]:
    """Returns `[B, T]` int64 with 0 behind the shorter rows, and how long each is."""
    lengths = [len(row) for row in rows]
    tokens = np.zeros((len(rows), max(lengths)), np.int64)
    for row, values in zip(tokens, rows, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(tokens), lengths


def _follow(model: HSATransformer, state: ModelState, first: Tensor, rows: Sequence[TokenArray]) -> list[Score]:
    """Scores a row of tokens behind each text; `first [B, V]` are the logits at the texts' ends."""
    tokens, lengths = padded(rows)
    tokens = tokens.to(model.device)
    sums, right = torch.zeros(len(rows), dtype=torch.float64), torch.ones(len(rows), dtype=torch.bool)
    size = max(1, min(piece_of(len(rows), model), LOGITS // first.numel()))
    for begin, end in itertools.pairwise(sorted({0, *range(1, tokens.shape[1], size), tokens.shape[1]})):
        num_valid = [min(max(length - begin, 0), end - begin) for length in lengths]
        logits = first[:, None] if begin == 0 else extend(model, tokens[:, begin - 1 : end - 1], state, num_valid)
        more, all_right = _judge(logits, tokens[:, begin:end], num_valid)
        sums, right = sums + more, right & all_right
    if not bool(sums.isfinite().all()):
        raise NotFinite(f"the log-probabilities of continuations are {sums.tolist()}; another dtype may help")
    return [Score(log_probability=float(a), is_greedy=bool(b)) for a, b in zip(sums, right, strict=True)]


def _judge(logits: Tensor, targets: Tensor, num_valid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns `[B]` sums of log-probabilities, and whether all are arg-max, of the valid ones of `targets [B, T]`."""
    place = torch.arange(targets.shape[1], device=targets.device)
    valid = place < torch.tensor(num_valid, device=targets.device)[:, None]
    logs = logits.double().log_softmax(dim=-1).gather(2, targets[:, :, None])[:, :, 0]
    right = (logits.argmax(dim=-1) == targets) | ~valid
    return logs.where(valid, 0.0).sum(dim=1).cpu(), right.all(dim=1).cpu()


def generations(
    subject: Subject,
    prompts: Sequence[TokenArray],
    stops: Sequence[Sequence[str]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
) -> list[str]:
    """Returns what a model writes behind each prompt; all are read at once.

    Args:
        subject: the model that writes, with its tokenizer.
        prompts: `[T]` tokens each, at least one.
        stops: for each prompt, the strings before which its continuation ends.
        max_new_tokens: a continuation ends after so many tokens too.
        sampling: how tokens are chosen.
    """
    tokenizer = subject.tokenizer
    tokens, lengths = padded(prompts)
    streams = [TextStream(tokenizer, stop) for stop in stops]
    texts = [""] * len(prompts)
    going = [True] * len(prompts)
    steps = stream(
        subject.model,
        tokens,
        lengths,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        state=subject.new_state(len(prompts)),
        going=going,
    )
    for step in steps:
        for row, token in enumerate(step):
            if token is None:
                continue
            if token == tokenizer.separator:
                going[row] = False
            else:
                texts[row] += streams[row].feed(token)
                going[row] = not streams[row].stopped
    return [text + each.finish() for text, each in zip(texts, streams, strict=True)]
