"""The words of the tasks: needles and the questions about them, before they are placed in a haystack.

The functions that end in `_facts` take what they tell of; the others draw everything from a seed and the haystack's
text, and draw anew what stands in that text by chance. Texts of a kind are equally long, whatever is drawn.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from hsa_compile.errors import InvalidArgument

Text = bytes | bytearray

NAME_BYTES = len("abc=")
NEEDLE_BYTES = len(" abc=1234.")
QUERY_BYTES = len(" ?abc=1234.")
CHAIN_LENGTH = 3
CHAIN_QUERY_BYTES = len(" ?ghi=def=abc=1234.")
END = b"."
LETTERS = b"abcdefghijklmnopqrstuvwxyz"
NUM_KEYS = len(LETTERS) ** 3
NUM_VALUES = 10_000
MAX_NEEDLES = 1_000  # out of 17,576 keys, so that enough are left where a text holds many
WORD_BYTES = 5
NUM_SAME = 4
_TRIES = 20_000
_LEAST_LETTERS = 6
_BLOCK = 2**20

# All are equally long, so that samples of a task are.
PLACES = (b"garden", b"cellar", b"office", b"studio", b"stable", b"chapel", b"museum", b"harbor")
_THINGS = (b"ring", b"coin", b"lamp", b"rope", b"bell", b"drum", b"vase", b"fork")
COMMON_COUNTS = (48, 32, 16)
NUM_FREQUENT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What stands at the end of a sample.

    Attributes:
        queries: (what stands before an answer, the answer); a full stop ends each answer.
        any_order: whether the answers may change places.
    """

    queries: tuple[tuple[bytes, bytes], ...]
    any_order: bool = False

    @property
    def text(self) -> bytes:
        """The question with its answers."""
        return b"".join(prompt + answer + END for prompt, answer in self.queries)

    @property
    def answer_spans(self) -> tuple[tuple[int, int], ...]:
        """(start, end) of each answer in `text`."""
        spans, end = [], 0
        for prompt, answer in self.queries:
            spans.append((end + len(prompt), end + len(prompt) + len(answer)))
            end += len(prompt) + len(answer) + len(END)
        return tuple(spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Needles and the question about them, before they are placed.

    Attributes:
        needles: their texts; those of a chain follow each other, and must do so when placed.
        num_chains: how many chains of equal length there are, the asked ones first; 0 where needles are independent.
        asked: which needles the answers need.
        questions: the question; or one for each needle, and the one is asked whose needle lies at the sample's depth.
    """

    needles: tuple[bytes, ...]
    num_chains: int = 0
    asked: tuple[int, ...]
    questions: tuple[Question, ...]

    @property
    def question(self) -> Question:
        """The first question."""
        return self.questions[0]


def copied_values(text: Text, answer_spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Yields where each value in the answers stands, where it stood first after the same name, and its size.

    The answer to `?ghi=def=abc=1234.` has three values, the last of which is `1234.`. Other questions have none.
    """
    for start, end in answer_spans:
        for value in text[start : end + len(END)].split(b"="):
            name = max(0, start - NAME_BYTES)
            first = text.find(text[name : start + len(value)], 0, name)
            if text[start - 1 : start] == b"=" and first >= 0:
                yield start, first + start - name, len(value)
            start += len(value) + 1


def draw_fresh(rng: random.Random, count: int, draw: Callable[[random.Random], bytes], text: Text) -> list[bytes]:
    """Draws different words that stand nowhere in a text with neither letter nor digit beside them.

    Raises:
        InvalidArgument: the text seems to hold them all.
    """
    found: dict[bytes, None] = {}
    for _ in range(_TRIES):
        if len(found) == count:
            break
        word = draw(rng)
        if word not in found and not _stands_in(text, word):
            found[word] = None
    if len(found) < count:
        raise InvalidArgument(f"the haystack holds too many words like {word.decode()} to hide {count} of them in it")
    return list(found)


def _stands_in(text: Text, word: bytes) -> bool:
    at = text.find(word)
    while at >= 0:
        end = at + len(word)
        if not text[max(0, at - 1) : at].isalnum() and not text[end : end + 1].isalnum():
            return True
        at = text.find(word, at + 1)
    return False


def draw_keys(rng: random.Random, count: int, text: Text, letters: bytes = LETTERS) -> list[bytes]:
    """Draws different keys, none of which the text assigns a value to already.

    Args:
        rng: draws them.
        count: how many to draw.
        text: the haystack.
        letters: what they are made of, each letter once.

    Raises:
        InvalidArgument: the text leaves too few keys.
    """
    if not 1 <= count <= MAX_NEEDLES:
        raise InvalidArgument(f"{count} needles; allowed are 1 to {MAX_NEEDLES}")
    is_free = b"=" not in text
    keys: list[bytes] = []
    shuffled: dict[int, int] = {}  # all numbers in random order, drawn one at a time
    num_keys = len(letters) ** 3
    for place in range(num_keys):
        other = rng.randrange(place, num_keys)
        number = shuffled.get(other, other)
        shuffled[other] = shuffled.get(place, place)
        key = _key_of(number, letters)
        if is_free or key + b"=" not in text:
            keys.append(key)
            if len(keys) == count:
                return keys
    raise InvalidArgument(f"the haystack assigns to too many names to hide {count} needles in it")


def few_letters(rng: random.Random, length: int) -> bytes:
    """Draws so few letters that nothing but needles on `length` bytes would take two fifths of the keys made of them.

    Then most keys have others that differ in a single letter, or have the same letters in another order, as any key has
    among a million bytes of needles.
    """
    enough = (number for number in range(_LEAST_LETTERS, len(LETTERS)) if 4 * number**3 >= length)
    return bytes(rng.sample(LETTERS, next(enough, len(LETTERS))))


def _key_of(number: int, letters: bytes) -> bytes:
    base = len(letters)
    return bytes((letters[number // base**2], letters[number // base % base], letters[number % base]))


def _with_another_letter(rng: random.Random, key: bytes) -> bytes:
    changed = bytearray(key)
    changed[rng.randrange(len(key))] = rng.choice(LETTERS)
    return bytes(changed)


def _value(rng: random.Random) -> bytes:
    return b"%04d" % rng.randrange(NUM_VALUES)


def draw_word(rng: random.Random) -> bytes:
    """Draws a word of random letters."""
    return bytes(rng.choices(LETTERS, k=WORD_BYTES))


def _name(rng: random.Random) -> bytes:
    """Draws a name that can be spoken, such as Tavok."""
    consonants, vowels = b"bdfghjklmnprstvwz", b"aeiou"
    return bytes(rng.choice(consonants if index % 2 == 0 else vowels) for index in range(WORD_BYTES)).capitalize()


def lookup_facts(rng: random.Random, keys: list[bytes], num_queries: int, text: Text = b"") -> Facts:
    """Makes independent needles, the first `num_queries` of which are asked for, in that order.

    Args:
        rng: draws the values, all different.
        keys: one for each needle.
        num_queries: how many are asked for, from 1 to the number of keys.
        text: what the values may not stand in.
    """
    if not 1 <= num_queries <= len(keys):
        raise InvalidArgument(f"num_queries {num_queries}; allowed are 1 to {len(keys)}, the number of needles")
    pairs = list(zip(keys, draw_fresh(rng, len(keys), _value, text), strict=True))
    return Facts(
        needles=tuple(b" %b=%b." % pair for pair in pairs),
        asked=tuple(range(num_queries)),
        questions=(Question(queries=tuple((b" ?%b=" % key, value) for key, value in pairs[:num_queries])),),
    )


def chain_facts(rng: random.Random, keys: list[bytes], num_queries: int, text: Text = b"") -> Facts:
    """Makes chains of `CHAIN_LENGTH` variables; the last variable of the first `num_queries` chains is asked for.

    Args:
        rng: draws the values.
        keys: `CHAIN_LENGTH` for each chain.
        num_queries: how many chains are asked for, from 1 to the number of chains.
        text: what the values may not stand in.
    """
    num_chains, rest = divmod(len(keys), CHAIN_LENGTH)
    if rest or not 1 <= num_queries <= num_chains:
        raise InvalidArgument(
            f"{len(keys)} needles and {num_queries} queries; allowed are multiples of {CHAIN_LENGTH} needles "
            "and from 1 query to one a chain"
        )
    needles: list[bytes] = []
    queries = []
    for chain, value in enumerate(draw_fresh(rng, num_chains, _value, text)):
        names = keys[chain * CHAIN_LENGTH : (chain + 1) * CHAIN_LENGTH]
        path = [value, *names]
        needles += (b" %b=%b." % (name, source) for source, name in zip(path, names, strict=False))
        queries.append((b" ?%b=" % names[-1], b"=".join(path[-2::-1])))
    return Facts(
        needles=tuple(needles),
        num_chains=num_chains,
        asked=tuple(range(num_queries * CHAIN_LENGTH)),
        questions=(Question(queries=tuple(queries[:num_queries])),),
    )


def lookups(rng: random.Random, text: Text, *, num_needles: int, num_queries: int = 1) -> Facts:
    """Draws names with a value each, of which the first few are asked for."""
    return lookup_facts(rng, draw_keys(rng, num_needles, text), num_queries, text)


def similar_lookups(rng: random.Random, text: Text, *, num_needles: int) -> Facts:
    """Draws a name that is asked for, and others that differ from it in a single letter."""
    keys = dict.fromkeys(draw_keys(rng, 1, text))
    while len(keys) < num_needles:
        keys[_with_another_letter(rng, next(iter(keys)))] = None
    return lookup_facts(rng, list(keys), 1, text)


def chains(rng: random.Random, text: Text, *, num_chains: int) -> Facts:
    """Draws chains of variables, the last variable of the first of which is asked for."""
    return chain_facts(rng, draw_keys(rng, num_chains * CHAIN_LENGTH, text), 1, text)


def several_values(rng: random.Random, text: Text, *, num_needles: int) -> Facts:
    """Draws one name with several values. It is asked for as often as it has values, each time for another one."""
    (key,), values = draw_keys(rng, 1, text), draw_fresh(rng, num_needles, _value, text)
    return Facts(
        needles=tuple(b" %b=%b." % (key, value) for value in values),
        asked=tuple(range(num_needles)),
        questions=(Question(queries=tuple((b" ?%b=" % key, value) for value in values), any_order=True),),
    )


def which_of_alike(rng: random.Random, text: Text, *, num_needles: int) -> Facts:
    """Draws one name with several values, one of which is asked for by its number in the order of the text."""
    (key,), values = draw_keys(rng, 1, text), draw_fresh(rng, num_needles, _value, text)
    return Facts(
        needles=tuple(b" %b=%b." % (key, value) for value in values),
        num_chains=1,  # they keep their order in the text
        asked=tuple(range(num_needles)),
        questions=tuple(Question(queries=((b" ?%b#%d=" % (key, n), value),)) for n, value in enumerate(values, 1)),
    )


def common_words(rng: random.Random, text: Text) -> Facts:
    """Draws words that stand in the text many times; they are asked for, the most common one first."""
    words = draw_fresh(rng, len(COMMON_COUNTS), draw_word, text)
    needles = [b" %b " % word for word, count in zip(words, COMMON_COUNTS, strict=True) for _ in range(count)]
    return Facts(
        needles=tuple(needles),
        asked=tuple(range(len(needles))),
        questions=(Question(queries=((b" ?common=", b",".join(words)),)),),
    )


def frequent_words(rng: random.Random, text: Text) -> Facts:
    """Asks for the words that stand most often in the text itself, the most frequent one first."""
    size = len(b" ?frequent=") + NUM_FREQUENT * (WORD_BYTES + 1)
    end = len(text) - size
    counts: Counter[bytes] = Counter()
    start = 0
    while start < end:
        cut = text.find(b" ", min(start + _BLOCK, end))
        stop = min(cut if cut >= 0 else end, end)
        counts.update(bytes(text[start:stop]).split())
        start = stop
    words = [word for word, _ in counts.most_common(NUM_FREQUENT)]
    return Facts(needles=(), asked=(), questions=(Question(queries=((b" ?frequent=", b",".join(words)),)),))


def workplaces(rng: random.Random, text: Text, *, num_needles: int) -> Facts:
    """Draws people with a place each; the place of the first one is asked for."""
    names = draw_fresh(rng, num_needles, _name, text)
    places = rng.choices(PLACES, k=num_needles)
    return Facts(
        needles=tuple(b" %b works in the %b." % pair for pair in zip(names, places, strict=True)),
        asked=(0,),
        questions=(Question(queries=((b" Where does %b work? " % names[0], places[0]),)),),
    )


def workplaces_of_bosses(rng: random.Random, text: Text, *, num_chains: int) -> Facts:
    """Draws people, their bosses and where those work; two facts, in any order, give the answer."""
    names = draw_fresh(rng, 2 * num_chains, _name, text)
    places = rng.choices(PLACES, k=num_chains)
    needles: list[bytes] = []
    for worker, boss, place in zip(names[::2], names[1::2], places, strict=True):
        pair = [b" The boss of %b is %b." % (worker, boss), b" %b works in the %b." % (boss, place)]
        needles += rng.sample(pair, k=2)
    return Facts(
        needles=tuple(needles),
        num_chains=num_chains,
        asked=(0, 1),
        questions=(Question(queries=((b" Where does the boss of %b work? " % names[0], places[0]),)),),
    )


def moves(rng: random.Random, text: Text, *, num_facts: int, num_people: int) -> Facts:
    """Draws people who go from place to place, and carry things; one, two or three facts give the answer.

    One fact says where a person is, two say where a thing is, three where it was before it came to a place.
    """
    names = draw_fresh(rng, num_people, _name, text)
    things = rng.sample(_THINGS, num_people)
    needles: list[bytes] = []
    queries: list[tuple[bytes, bytes]] = []
    for name, thing in zip(names, things, strict=True):
        places = rng.sample(PLACES, 3 if num_facts == 3 else 2)
        story = [b" %b went to the %b." % (name, place) for place in places]
        if num_facts > 1:
            story.insert(3 - num_facts, b" %b took the %b." % (name, thing))
        needles += story
        later = rng.randrange(1, len(places))
        if num_facts == 1:
            queries.append((b" Where is %b? " % name, places[-1]))
        elif num_facts == 2:
            queries.append((b" Where is the %b? " % thing, places[-1]))
        else:
            queries.append((b" Where was the %b before the %b? " % (thing, places[later]), places[later - 1]))
    size = len(needles) // num_people
    return Facts(
        needles=tuple(needles),
        num_chains=num_people,
        asked=tuple(range(size)),
        questions=(Question(queries=(queries[0],)),),
    )
