"""Continuing texts: the exact fast prefill reads the prompt, then tokens are drawn row by row until each has ended.

`Sampling` and `Sampler` choose tokens, `generate` and `stream` make them, `TextStream` turns them into text.
"""

import codecs
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hsa_compile.checks import check_count
from hsa_compile.errors import InvalidArgument, NotFinite
from hsa_compile.model.config import MAX_SEED
from hsa_compile.model.data.tokenizer import BYTES, Tokenizer
from hsa_compile.model.inference.inference import ModelState, extend, new_state, prefill
from hsa_compile.model.memory.shared import SharedMemory
from hsa_compile.model.transformer import HSATransformer

OnToken = Callable[[int, int], object]
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 8  # how many tokens one character may be made of


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: what logits are divided by; 0 takes the most likely token.
        top_p: a token is drawn only from the most likely ones whose probabilities sum up to this much; 1 for all.
        seed: row b of a batch draws with `seed + b`, as it would alone with that seed, whatever the other rows do.

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
        check_count("seed", self.seed, 0, MAX_SEED)


class Sampler:
    """Draws tokens, with a stream of random numbers for each row.

    Args:
        sampling: how tokens are chosen.
        batch: how many rows there are.
    """

    def __init__(self, sampling: Sampling, batch: int) -> None:
        self.sampling = sampling
        # The numbers are drawn on the CPU, so that every device draws the same.
        self._streams = [torch.Generator().manual_seed((sampling.seed + b) % 2**63) for b in range(batch)]

    def __call__(self, logits: Tensor) -> Tensor:
        """Draws the next token `[B]` from `logits [B, V]`."""
        if self.sampling.temperature == 0:
            return logits.argmax(dim=-1)
        uniform = torch.stack([torch.rand((), dtype=torch.float64, generator=stream) for stream in self._streams])
        return draw(logits, uniform.to(logits.device), self.sampling.temperature, self.sampling.top_p)


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draws the token at which the sum of probabilities, from the most likely token on, passes a random number.

    Args:
        logits: `[B, V]`.
        uniform: `[B]` float64 in 0 … 1.
        temperature, top_p: as in `Sampling`.

    Returns:
        `[B]` int64.
    """
    scaled = (logits.double() - logits.double().amax(dim=-1, keepdim=True)) / temperature
    probabilities, tokens = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    sums = probabilities.cumsum(dim=-1)
    kept = probabilities.masked_fill(sums - probabilities >= top_p, 0.0)  # the token that passes top_p stays
    kept[:, 0] = probabilities[:, 0]
    sums = kept.cumsum(dim=-1)
    # `right` gives a number on a border to the next token, and never picks one of probability 0 behind the last.
    place = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)
    last = ((kept > 0).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    return tokens.gather(1, torch.minimum(place, last))[:, 0]


def generate(
    model: HSATransformer,
    prompt: Tensor,
    lengths: Sequence[int] | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Sequence[Sequence[int]] = (),
    seed: int = 0,
    state: ModelState | None = None,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Continues each prompt.

    Args:
        model: the model that continues.
        prompt: `[T]` or `[B, T]` integers, on any device; shorter rows end in padding.
        lengths: how many tokens of each row are no padding, at least 1; None if all are.
        max_new_tokens: a row ends after so many tokens, 0 or more.
        temperature, top_p, seed: as in `Sampling`.
        stop: sequences of tokens, `bytes` for a model of bytes; a row ends with the first of them that it writes.
        state: the state of texts that were read before and that the prompts go on from; None for an empty one. It is
            changed in place, and afterwards holds the prompt and all new tokens but the last.
        on_token: is called with row and token as they come, including the tokens of a stop sequence.

    Returns:
        the new tokens of each row, without the stop sequence that ended it.

    Raises:
        InvalidArgument: a value is not allowed, or prompts do not fit the state.
    """
    ends = [list(sequence) for sequence in stop]
    if not all(ends):
        raise InvalidArgument(f"stop = {list(stop)} holds an empty sequence; at least one token is needed in each")
    batch = prompt.shape[0] if prompt.dim() == 2 else 1
    rows: list[list[int]] = [[] for _ in range(batch)]
    going = [True] * batch
    results = list(rows)
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    steps = stream(model, prompt, lengths, max_new_tokens=max_new_tokens, sampling=sampling, state=state, going=going)
    for tokens in steps:
        for b, token in enumerate(tokens):
            if token is None:
                continue
            rows[b].append(token)
            if on_token is not None:
                on_token(b, token)
            written = [len(end) for end in ends if rows[b][-len(end) :] == end]
            if written:
                results[b] = rows[b][: -max(written)]
                going[b] = False
    return results


def stream(
    model: HSATransformer,
    prompt: Tensor,
    lengths: Sequence[int] | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    state: ModelState | None = None,
    going: list[bool] | None = None,
) -> Iterator[list[int | None]]:
    """Yields the next token of each row, step by step; whoever reads them says which rows go on.

    Args:
        model, prompt, lengths, max_new_tokens, state: as in `generate`.
        sampling: how tokens are chosen.
        going: one truth value a row; a row whose value the caller makes false rests from then on.

    Yields:
        a token for each row, None where it rests.

    Raises:
        InvalidArgument: as in `generate`.
        NotFinite: the model's logits are infinite or not a number.
    """
    prompt = prompt[None] if prompt.dim() == 1 else prompt
    _check_prompt(model, prompt, max_new_tokens)
    batch = prompt.shape[0]
    going = [True] * batch if going is None else going
    state = new_state(model, batch) if state is None else state
    with evaluating(model):
        logits = prefill(model, prompt, state, lengths)
    sampler = Sampler(sampling, batch)
    for step in range(max_new_tokens):
        check_finite(logits, going, step)
        tokens = sampler(logits)
        if isinstance(state.memory, SharedMemory):
            tokens = state.memory.agreed(tokens)
        values = tokens.tolist()
        yield [value if going[b] else None for b, value in enumerate(values)]
        if step == max_new_tokens - 1 or not any(going):
            return
        with evaluating(model):
            logits = extend(model, tokens[:, None], state, [int(goes) for goes in going])[:, 0]


def check_finite(logits: Tensor, going: Sequence[bool], step: int) -> None:
    """Raises NotFinite, with the number of the text and of its new token, unless logits have a finite maximum.

    Args:
        logits: `[B, V]`.
        going: which texts go on.
        step: the number of the new token, from 0.
    """
    peaks = logits.amax(dim=-1).tolist()  # a NaN is the largest of all
    for row, (peak, goes) in enumerate(zip(peaks, going, strict=True)):
        if goes and not math.isfinite(peak):
            raise NotFinite(f"the logits of new token {step} of text {row} hold {peak}; another dtype may help")


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Sets the model to evaluation mode, and back to what it was afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _check_prompt(model: HSATransformer, prompt: Tensor, max_new_tokens: int) -> None:
    if prompt.dim() != 2:
        raise InvalidArgument(f"prompt has shape {list(prompt.shape)}; [T] or [B, T] is needed")
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise InvalidArgument(f"max_new_tokens = {max_new_tokens!r} must be an integer of at least 0")
    if prompt.numel() == 0:
        raise InvalidArgument(f"prompt has shape {list(prompt.shape)}: one token at least is needed in each row")
    low, high = (int(value) for value in prompt.aminmax())
    if low < 0 or high >= model.config.vocab_size:
        raise InvalidArgument(
            f"prompt holds token {low if low < 0 else high}; allowed are 0 … {model.config.vocab_size - 1}"
        )


class TextStream:
    """Turns tokens into text that can be shown at once.

    Args:
        tokenizer: the tokenizer that made the tokens.
        stop: strings that end the text; no part of them is shown.

    Raises:
        InvalidArgument: a stop string is empty.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if not all(stop):
            raise InvalidArgument(f"stop = {list(stop)} holds an empty string")
        self.stopped = False
        self._stop = tuple(stop)
        self._held = ""  # the beginning of a stop string, perhaps
        self._decode: _Bytes | _Tokens = _Bytes() if tokenizer.name == BYTES else _Tokens(tokenizer.decode)

    def feed(self, token: int) -> str:
        """Returns the text that is certain after one more token."""
        return self._pass(self._decode.feed(token))

    def finish(self) -> str:
        """Returns what was held back, when no more tokens come."""
        shown = self._pass(self._decode.finish())
        if not self.stopped:
            shown, self._held = shown + self._held, ""
        return shown

    def _pass(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        places = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class _Bytes:
    """Decodes UTF-8 byte by byte; what is none becomes U+FFFD, also a token of a larger vocabulary."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        return self._decoder.decode(bytes([min(token, 0xFF)]))  # 0xFF stands nowhere in UTF-8

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Tokens:
    """Decodes tokens whose text may depend on those before and end inside a character, a few again each time."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._shown: list[int] = []  # the newest whose text is out, for the spaces between words
        self._new: list[int] = []

    def feed(self, token: int) -> str:
        self._new.append(token)
        text = self._text()
        if text.endswith(_UNKNOWN) and len(self._new) < _LONGEST_CHARACTER:
            return ""
        self._shown, self._new = self._new, []
        return text

    def finish(self) -> str:
        text, self._new = self._text(), []
        return text

    def _text(self) -> str:
        return self._decode(self._shown + self._new)[len(self._decode(self._shown)) :]
