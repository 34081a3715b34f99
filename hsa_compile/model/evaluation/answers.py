"""Whether a model answers the question that it has read, by the authors' protocol and by greedy generation."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.choices import GREEDY, PROTOCOLS, TEACHER_FORCED
from hsa_compile.model.inference import ModelState, extend, prefill
from hsa_compile.model.rewinding import rewind, snapshot
from hsa_compile.model.tasks.sample import ByteArray, TaskSample
from hsa_compile.model.transformer import HSATransformer


def answered(
    model: HSATransformer,
    state: ModelState,
    samples: Sequence[TaskSample],
    num_read: int,
    protocols: Sequence[str],
    piece: int,
) -> dict[str, list[bool]]:
    """Whether each sample is answered, by protocol.

    Args:
        model: in evaluation mode.
        state: that has read the first `num_read` bytes of each sample; is changed.
        samples: of equal length, with answers at equal places.
        num_read: bytes, fewer than there are before the first answer.
        protocols: of `PROTOCOLS`.
        piece: tokens of a row read at once.
    """
    tokens = torch.from_numpy(np.stack([sample.tokens[num_read:] for sample in samples]))
    prompt = samples[0].answer_spans[0][0] - num_read
    first = prefill(model, tokens[:, :prompt], state, piece=piece).argmax(dim=-1)
    point = snapshot(state)
    rest = tokens[:, prompt:].to(model.device, torch.int64)
    found = {}
    for protocol in protocols:
        rewind(state, point)
        if protocol == TEACHER_FORCED:
            predicted = torch.cat((first[:, None], extend(model, rest[:, :-1], state).argmax(dim=-1)), dim=1)
            rows = zip(samples, predicted.cpu().numpy(), strict=True)
            found[protocol] = [sample.is_answered_by(row) for sample, row in rows]
        elif protocol == GREEDY:
            rows = zip(samples, _generated(model, state, first, rest).cpu().numpy(), strict=True)
            found[protocol] = [sample.is_answered_by(row) and _ends(sample, row) for sample, row in rows]
        else:
            raise InvalidArgument(f"protocol {protocol!r}; allowed are {', '.join(PROTOCOLS)}")
    return found


def _generated(model: HSATransformer, state: ModelState, first: Tensor, rest: Tensor) -> Tensor:
    """The byte that the model writes at each place, `[B, T]`.

    After a byte that is wrong the true one is fed: a wrong answer stays wrong whatever follows, and a right one was fed
    what the model wrote. So whole answers come out right exactly where free generation gives them.
    """
    written = [first]
    for step in range(rest.shape[1] - 1):
        written.append(extend(model, rest[:, step : step + 1], state)[:, 0].argmax(dim=-1))
    return torch.stack(written, dim=1)


def _ends(sample: TaskSample, predicted: ByteArray) -> bool:
    """Whether a full stop was written behind each answer; without it, the answer would go on."""
    offset = len(sample.tokens) - len(predicted)
    return all(predicted[end - offset] == sample.tokens[end] for _, end in sample.answer_spans)
