"""The sentences that are hidden and the question that asks for them, in a form that a model of bytes can learn.

A needle is ` abc=1234.`, the question ` ?abc=` with the answer `1234` and a full stop. Variable tracking has chains
` abc=1234.`, ` def=abc.`, ` ghi=def.`, and the question ` ?ghi=` is answered by the way back to the value,
`def=abc=1234`. RULER writes whole English sentences; the lookup is the same, the wording is not.
"""

import random
from dataclasses import dataclass

from hsa_compile.errors import InvalidArgument

NEEDLE_BYTES = len(" abc=1234.")
QUERY_BYTES = len(" ?abc=1234.")
CHAIN_LENGTH = 3
CHAIN_QUERY_BYTES = len(" ?ghi=def=abc=1234.")
_LETTERS = b"abcdefghijklmnopqrstuvwxyz"
_NUM_KEYS = len(_LETTERS) ** 3
_NUM_VALUES = 10_000
MAX_NEEDLES = 1_000  # out of 17,576 keys, so that enough are left where a text holds many


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Needles and the question about them, before they are placed.

    Attributes:
        needles: texts of at most `NEEDLE_BYTES`; those of a chain follow each other, and must do so when placed.
        num_chains: how many chains there are; 0 where needles are independent.
        asked: which needles the answers need.
        question: the text of the question, with the answers in it.
        answer_spans: (start, end) of each answer in `question`.
    """

    needles: tuple[bytes, ...]
    num_chains: int = 0
    asked: tuple[int, ...]
    question: bytes
    answer_spans: tuple[tuple[int, int], ...]


def draw_keys(rng: random.Random, count: int, text: bytes | bytearray) -> list[bytes]:
    """Draws different keys, none of which the text assigns a value to already.

    Raises:
        InvalidArgument: the text leaves too few keys.
    """
    if not 1 <= count <= MAX_NEEDLES:
        raise InvalidArgument(f"{count} needles; allowed are 1 to {MAX_NEEDLES}")
    is_free = b"=" not in text
    keys: list[bytes] = []
    for number in rng.sample(range(_NUM_KEYS), min(4 * count + 64, _NUM_KEYS) if not is_free else count):
        key = bytes((_LETTERS[number // 676], _LETTERS[number // 26 % 26], _LETTERS[number % 26]))
        if is_free or key + b"=" not in text:
            keys.append(key)
            if len(keys) == count:
                return keys
    raise InvalidArgument(f"the haystack assigns to too many names to hide {count} needles in it")


def draw_similar_keys(rng: random.Random, count: int, text: bytes | bytearray) -> list[bytes]:
    """Draws keys as `draw_keys` does, but about half of them differ from an earlier one in a single letter.

    Raises:
        InvalidArgument: the text leaves too few keys.
    """
    keys = draw_keys(rng, count, text)
    used = set(keys)
    for index in range(1, count):
        key = bytearray(keys[rng.randrange(index)])
        key[rng.randrange(len(key))] = rng.choice(_LETTERS)
        similar = bytes(key)
        if rng.random() < 0.5 and similar not in used and similar + b"=" not in text:
            keys[index] = similar
            used.add(similar)
    return keys


def lookup_facts(rng: random.Random, keys: list[bytes], num_queries: int) -> Facts:
    """Makes independent needles, the first `num_queries` of which are asked for, in that order.

    Args:
        rng: draws the values, all different.
        keys: one for each needle.
        num_queries: how many are asked for, from 1 to the number of keys.
    """
    if not 1 <= num_queries <= len(keys):
        raise InvalidArgument(f"num_queries {num_queries}; allowed are 1 to {len(keys)}, the number of needles")
    values = [b"%04d" % value for value in rng.sample(range(_NUM_VALUES), len(keys))]
    question = b"".join(b" ?%b=%b." % pair for pair in zip(keys[:num_queries], values, strict=False))
    ends = range(NEEDLE_BYTES, len(question), QUERY_BYTES)
    return Facts(
        needles=tuple(b" %b=%b." % pair for pair in zip(keys, values, strict=True)),
        asked=tuple(range(num_queries)),
        question=question,
        answer_spans=tuple((end - 4, end) for end in ends),
    )


def chain_facts(rng: random.Random, keys: list[bytes], num_queries: int) -> Facts:
    """Makes chains of `CHAIN_LENGTH` variables; the last variable of the first `num_queries` chains is asked for.

    Args:
        rng: draws the values.
        keys: `CHAIN_LENGTH` for each chain.
        num_queries: how many chains are asked for, from 1 to the number of chains.
    """
    num_chains, rest = divmod(len(keys), CHAIN_LENGTH)
    if rest or not 1 <= num_queries <= num_chains:
        raise InvalidArgument(
            f"{len(keys)} needles and {num_queries} queries; allowed are multiples of {CHAIN_LENGTH} needles "
            "and from 1 query to one a chain"
        )
    needles: list[bytes] = []
    question = b""
    spans = []
    for chain, value in enumerate(rng.sample(range(_NUM_VALUES), num_chains)):
        names = keys[chain * CHAIN_LENGTH : (chain + 1) * CHAIN_LENGTH]
        path = [b"%04d" % value, *names]
        needles += (b" %b=%b." % (name, source) for source, name in zip(path, names, strict=False))
        if chain < num_queries:
            question += b" ?%b=" % names[-1]
            answer = b"=".join(path[-2::-1])
            spans.append((len(question), len(question) + len(answer)))
            question += answer + b"."
    return Facts(
        needles=tuple(needles),
        num_chains=num_chains,
        asked=tuple(range(num_queries * CHAIN_LENGTH)),
        question=question,
        answer_spans=tuple(spans),
    )
