"""What the retrieval tasks ask, and which samples that means.

A sample depends on its task, length, depth, number and seed alone, not on what else is evaluated.
"""

import hashlib
import random
from dataclasses import dataclass
from typing import Any

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.config import PROTOCOLS
from hsa_compile.model.tasks.family import TASKS, sizes
from hsa_compile.model.tasks.haystack import Haystack

HAYSTACK_TOKENS = 2**18  # how many tokens all haystacks of a length have together; a longer one is alone
MAX_HAYSTACKS = 64
MAX_SAMPLES = 2**20
DEFINITION = 4  # grows when a task's samples change, so that outcomes of others are not taken for theirs


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalSettings:
    """What the retrieval tasks ask.

    Attributes:
        tasks: some of `TASKS`.
        lengths: lengths in tokens, question and answers included.
        depths: where the asked needle lies, 0 to 1.
        num_samples: how many samples there are for each task, length and depth; a task without a depth has as many as
            others have together.
        protocols: some of `PROTOCOLS`.
        seed: the seed of all that is random.
        min_distance: more than so many tokens lie between any needle and the question.

    Raises:
        InvalidArgument: a value is not allowed.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    num_samples: int
    protocols: tuple[str, ...]
    seed: int = 0
    min_distance: int = 0

    def __post_init__(self) -> None:
        for name, values, allowed in (("task", self.tasks, TASKS), ("protocol", self.protocols, PROTOCOLS)):
            if unknown := [value for value in values if value not in allowed]:
                raise InvalidArgument(f"{name} {unknown[0]!r}; allowed are {', '.join(allowed)}")
        if bad := [depth for depth in self.depths if not 0 <= depth <= 1]:
            raise InvalidArgument(f"depth {bad[0]}; allowed is 0, the beginning, to 1, the end")
        if self.num_samples < 1 or self.min_distance < 0:
            raise InvalidArgument(
                f"{self.num_samples} samples with distance {self.min_distance}; allowed are 1 or more, and 0 or more"
            )
        for task in self.tasks:
            least = least_length(task, self.min_distance)
            if short := [length for length in self.lengths if length < least]:
                raise InvalidArgument(f"length {short[0]} is too short for {task}; the least allowed is {least}")

    def samples_of(self, task: str) -> list[tuple[float | None, int]]:
        """Returns depth and number of each sample of a task at a length, depth by depth."""
        depths: tuple[float | None, ...] = self.depths
        count = self.num_samples
        if not TASKS[task].has_depth:
            depths, count = (None,), count * len(depths)
        return [(depth, index) for depth in depths for index in range(count)]


def least_length(task: str, min_distance: int) -> int:
    """Returns in how many tokens the needles of a task have room, wherever the asked one lies."""
    return sizes(task).least + min_distance


def haystack_key(haystack: Haystack) -> dict[str, str]:
    """Returns a haystack's name, and a digest of some of its text, which very likely differs where the text does."""
    text = haystack.fill(2**16, random.Random("haystack"))
    return {"haystack": haystack.name, "haystack_digest": hashlib.sha256(text).hexdigest()[:16]}


def sample_key(
    settings: RetrievalSettings,
    common: dict[str, Any],
    task: str,
    length: int,
    depth: float | None,
    index: int,
    protocol: str,
) -> dict[str, Any]:
    """Returns the key under which the outcome of a sample is kept.

    Args:
        settings: what is asked.
        common: what all samples share: `Subject.key` and `haystack_key`.
        task, length, depth, index, protocol: what distinguishes the sample.
    """
    return common | {
        "task": task,
        "definition": DEFINITION,
        "length": length,
        "depth": depth,
        "seed": settings.seed,
        "min_distance": settings.min_distance,
        "index": index,
        "protocol": protocol,
    }


def num_haystacks(task: str, length: int) -> int:
    """Returns how many haystacks the samples of a length share; where nothing is hidden, each has its own.

    Task and length alone decide, so that samples stay the same whatever else is asked.
    """
    if not sizes(task).num_needles:
        return MAX_SAMPLES
    return max(1, min(HAYSTACK_TOKENS // length, MAX_HAYSTACKS))


def least_prompt(task: str, length: int) -> int:
    """Returns how many tokens a sample has before its first answer; with a tokenizer, a few less than there are."""
    return length - sizes(task).question + sizes(task).prompt


def length_label(length: int) -> str:
    """Returns `4K`, `64K`, `1M`, or plain digits where the length is no multiple."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if length % size == 0:
            return f"{length // size}{unit}"
    return str(length)
