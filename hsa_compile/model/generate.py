"""Continuing texts: the prompt by the exact fast prefill, then token by token, row by row until each has ended."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.inference import ModelState, extend, new_state, prefill
from hsa_compile.model.sampling import Sampler, Sampling
from hsa_compile.model.transformer import HSATransformer

OnToken = Callable[[int, int], object]


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
    """The continuation of each prompt.

    Args:
        model: that continues.
        prompt: `[T]` or `[B, T]` integers, on any device; shorter rows end in padding.
        lengths: tokens of each row that are no padding, at least 1; None for all.
        max_new_tokens: a row ends after so many, 0 or more.
        temperature, top_p, seed: as of `Sampling`.
        stop: sequences of tokens, `bytes` for a model of bytes; a row ends with the first one that it writes.
        state: of texts that were read before and that the prompts go on from; is changed in place, and afterwards
            holds the prompt and all new tokens but the last. None for an empty one.
        on_token: is called with row and token as they come, those of a stop sequence included.

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
    """The next token of each row, step by step; what reads them says who goes on.

    Args:
        model, prompt, lengths, max_new_tokens, state: as of `generate`.
        sampling: how tokens are chosen.
        going: one truth value a row; a row whose value the caller makes false rests from then on.

    Yields:
        a token for each row, None where it rests.

    Raises:
        InvalidArgument: as of `generate`.
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
        tokens = sampler(logits)
        values = tokens.tolist()
        yield [value if going[b] else None for b, value in enumerate(values)]
        if step == max_new_tokens - 1 or not any(going):
            return
        with evaluating(model):
            logits = extend(model, tokens[:, None], state, [int(goes) for goes in going])[:, 0]


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards as it was."""
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
