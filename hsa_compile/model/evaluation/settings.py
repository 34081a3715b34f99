"""What the retrieval tasks ask, and which samples that means.

A sample depends on its task, length, depth, number and seed alone, not on what else is evaluated.
"""

import hashlib
import random
from dataclasses import dataclass
from typing import Any

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.config import PROTOCOLS
from hsa_compile.model.tasks.haystack import Haystack
from hsa_compile.model.tasks.retrieval import TASKS
from hsa_compile.model.tasks.sample import CHAIN_QUERY_BYTES, NEEDLE_BYTES, QUERY_BYTES

HAYSTACK_TOKENS = 2**18  # how many tokens all haystacks of a length have together; a longer one is alone
MAX_HAYSTACKS = 64
_ASKING_BYTES = len(" ?abc=")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalSettings:
    """What the retrieval tasks ask.

    Attributes:
        tasks: some of `TASKS`.
        lengths: lengths in bytes, question and answers included.
        depths: where the first asked needle lies, 0 to 1.
        num_samples: how many samples there are for each task, length and depth.
        protocols: some of `PROTOCOLS`.
        seed: the seed of all that is random.
        min_distance: more than so many bytes lie between any needle and the question.

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


def least_length(task: str, min_distance: int) -> int:
    """Returns in how many bytes the needles of a task have room, wherever the first one lies."""
    num_needles = TASKS[task].num_needles
    places = num_needles + (num_needles > 1)  # one may be lost to where the first one lies
    return places * NEEDLE_BYTES + min_distance + 1 + _question_bytes(task)


def haystack_key(haystack: Haystack) -> dict[str, str]:
    """Returns a haystack's name, and a digest of some of its text, which very likely differs where the text does."""
    text = haystack.fill(2**16, random.Random("haystack"))
    return {"haystack": haystack.name, "haystack_digest": hashlib.sha256(text).hexdigest()[:16]}


def sample_key(
    settings: RetrievalSettings, common: dict[str, Any], task: str, length: int, depth: float, index: int, protocol: str
) -> dict[str, Any]:
    """Returns the key under which the outcome of a sample is kept.

    Args:
        settings: what is asked.
        common: what all samples share: `Subject.key` and `haystack_key`.
        task, length, depth, index, protocol: what distinguishes the sample.
    """
    return common | {
        "task": task,
        "length": length,
        "depth": depth,
        "seed": settings.seed,
        "min_distance": settings.min_distance,
        "index": index,
        "protocol": protocol,
    }


def num_haystacks(length: int) -> int:
    """Returns how many haystacks samples of a length have; the length alone decides, so that samples stay the same."""
    return max(1, min(HAYSTACK_TOKENS // length, MAX_HAYSTACKS))


def _question_bytes(task: str) -> int:
    each = CHAIN_QUERY_BYTES if TASKS[task].has_chains else QUERY_BYTES
    return each * TASKS[task].num_queries


def prompt_length(task: str, length: int) -> int:
    """Returns how many bytes a sample has before its first answer."""
    return length - _question_bytes(task) + _ASKING_BYTES


def length_label(length: int) -> str:
    """Returns `4K`, `64K`, `1M`, or plain digits where the length is no multiple."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if length % size == 0:
            return f"{length // size}{unit}"
    return str(length)
