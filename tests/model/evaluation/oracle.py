"""A model that looks answers up in the text it has read, and never errs but where it is told to."""

import re

import torch
from reader import answers
from small_models import small_config
from torch import Tensor, nn

from hsa_compile.model.layers.attention import FullCache
from hsa_compile.model.transformer import HSATransformer

_QUESTION = re.compile(rb"( \?[a-z]+(?:#\d)?=| Where [A-Za-z ]*\? )([a-z0-9=,]*)$")


class Oracle(HSATransformer):
    """Reads through the real prefill and extend; only what the layers would compute is replaced.

    Args:
        stops: whether it writes the full stop behind an answer.
        blind_after: it does not see needles that end after this byte; None sees all.
        seed: of its weights, by which alone it is told apart.
    """

    def __init__(self, *, stops: bool = True, blind_after: int | None = None, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__(small_config("full", vocab_size=256, embedding_window=1))
        self.norm = nn.Identity()
        self.stops, self.blind_after = stops, blind_after

    def embed(self, tokens: Tensor) -> Tensor:
        return tokens.float()[..., None].expand(-1, -1, self.config.dim)

    def empty_caches(self, layers, batch):
        return [FullCache(k=torch.zeros(batch, 0), v=torch.zeros(batch, 0))]

    def run(self, layers, x, piece, caches=None, selections=None):
        if layers is self.lower:
            return x, caches
        (cache,) = caches
        text = torch.cat((cache.k, x[..., 0]), dim=1)
        before = cache.k.shape[1]
        written = [
            [self._next(bytes(row[: before + t + 1])) for t in range(x.shape[1])] for row in text.byte().tolist()
        ]
        out = torch.tensor(written).float()[..., None].expand(-1, -1, self.config.dim)
        return out, [FullCache(k=text, v=text)]

    def logits(self, hidden: Tensor) -> Tensor:
        return nn.functional.one_hot(hidden[..., 0].long(), 256).float()

    def _next(self, text: bytes) -> int:
        question = _QUESTION.search(text)
        if question is None:
            return 0
        asked, begun = question.groups()
        for right in reversed(answers(text[: question.start()][: self.blind_after], asked)):
            written = right + (b"." if self.stops else b"!")
            if written.startswith(begun) and len(begun) < len(written):
                return written[len(begun)]
        return 0
