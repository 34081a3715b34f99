"""The model that is evaluated, and where its memory lies meanwhile."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.data.tokenizer import BYTES, Tokenizer
from hsa_compile.model.inference.inference import PIECE, ModelState, new_state
from hsa_compile.model.inference.reading import fingerprint
from hsa_compile.model.transformer import HSATransformer

ROW_TOKENS = 2**16  # how many tokens all rows of a batch have together
PIECE_TOKENS = 2**14


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """A model with all that its answers depend on.

    Attributes:
        name: the name that is printed.
        model: the model, in evaluation mode.
        tokenizer: the tokenizer of the model.
        memory: where chunk keys and values lie, as in `new_state`.
        memory_dtype: the dtype in which they are kept; the weights' if None.
        directory: where their files are made, for `disk`.
        fingerprint: the fingerprint of the model.
    """

    name: str
    model: HSATransformer
    tokenizer: Tokenizer
    memory: str = "device"
    memory_dtype: torch.dtype | None = None
    directory: Path | None = None
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprint", fingerprint(self.model))

    def new_state(self, batch: int = 1) -> ModelState:
        """Makes the state before the first token of `batch` texts."""
        return new_state(
            self.model, batch, memory=self.memory, directory=self.directory, memory_dtype=self.memory_dtype
        )

    def key(self) -> dict[str, str]:
        """Returns what tells its results from those of others; where the memory lies changes none."""
        dtype = self.memory_dtype or self.model.embedding.weight.dtype
        return {"model": self.fingerprint, "memory_dtype": str(dtype).removeprefix("torch.")}

    def check_reads_bytes(self) -> None:
        """Raises InvalidArgument unless tokens are bytes, which needles are made of."""
        if self.tokenizer.digest != BYTES or self.model.config.vocab_size < self.tokenizer.vocab_size:
            raise InvalidArgument(
                f"retrieval tasks are written in bytes; {self.name} has tokenizer {self.tokenizer.name} and a "
                f"vocabulary of {self.model.config.vocab_size}"
            )


def num_rows(length: int) -> int:
    """Returns how many texts of a length are read at once."""
    return max(1, ROW_TOKENS // length)


def piece_of(rows: int) -> int:
    """Returns how many tokens of each of so many rows run through the layers at once."""
    return min(PIECE, max(64, PIECE_TOKENS // rows))
