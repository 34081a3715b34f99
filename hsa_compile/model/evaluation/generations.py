"""Texts continued, several at once, each until a stop string or the end of its document."""

from collections.abc import Sequence

from hsa_compile.model.data.tokenizer import TokenArray
from hsa_compile.model.evaluation.continuations import padded
from hsa_compile.model.evaluation.subject import Subject
from hsa_compile.model.generate import stream
from hsa_compile.model.sampling import Sampling
from hsa_compile.model.text_stream import TextStream


def generations(
    subject: Subject,
    prompts: Sequence[TokenArray],
    stops: Sequence[Sequence[str]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
) -> list[str]:
    """What a model writes behind each prompt; all are read at once.

    Args:
        subject: whose model writes.
        prompts: `[T]` tokens each, at least one.
        stops: of each prompt, strings before which its continuation ends.
        max_new_tokens: after so many it ends too.
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
