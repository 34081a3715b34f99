"""A model as lm-evaluation-harness sees it: log-likelihoods and generations, over contexts of any length."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hsa_compile.errors import HSACompileWarning, InvalidArgument, warn_user
from hsa_compile.log import progress_bar
from hsa_compile.model.data.tokenizer import TokenArray, token_dtype
from hsa_compile.model.evaluation.continuations import Score, batches, branches_of, generations, scores
from hsa_compile.model.evaluation.outcomes import OutcomeFile
from hsa_compile.model.evaluation.subject import Subject
from hsa_compile.model.inference.generate import Sampling
from hsa_compile.versions import missing

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
except ModuleNotFoundError as error:
    raise missing("lm_eval", "--harness") from error

HARNESS = "harness"
MAX_NEW_TOKENS = 256  # the limit where a task names none, as in the harness's own models
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one given counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How a task wants a text continued.

    Attributes:
        until: strings before which the continuation ends.
        max_new_tokens: the continuation ends after so many tokens too.
        temperature, top_p: as in `Sampling`.
    """

    until: tuple[str, ...]
    max_new_tokens: int
    temperature: float
    top_p: float

    @classmethod
    def from_kwargs(cls, kwargs: dict[str, Any]) -> "Generation":
        """Reads the words of the harness; names that mean nothing here cause a warning."""
        rest = dict(kwargs)
        until = rest.pop("until", None) or ()
        limits = [limit for limit in (rest.pop(name, None) for name in _LIMITS) if limit is not None]
        do_sample, temperature, top_p = (rest.pop(name, None) for name in ("do_sample", "temperature", "top_p"))
        if temperature is None:
            temperature = 1.0 if do_sample else 0.0
        is_greedy = do_sample is False or temperature == 0
        if unused := [name for name, value in rest.items() if value is not None]:
            warn_user(
                f"generation ignores {', '.join(unused)}; what counts is until, {_LIMITS[0]}, do_sample, temperature "
                "and top_p",
                HSACompileWarning,
            )
        return cls(
            until=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
            max_new_tokens=int(limits[0]) if limits else MAX_NEW_TOKENS,
            temperature=0.0 if is_greedy else float(temperature),
            top_p=1.0 if is_greedy or top_p is None else float(top_p),
        )


class HarnessModel(LM):
    """Answers the harness's requests; those that are in the file of outcomes are not computed again.

    No text is cut: the memory has no limit, so a context is read from its beginning however long it is, and a rolling
    log-likelihood takes a whole document, each token given all before it. An empty context is the tokenizer's
    end-of-document token.

    Args:
        subject: the model.
        outcomes: where answers are kept.
        seed: the seed of generations that are drawn.
        quiet: whether to show no progress bar.

    Raises:
        InvalidArgument: the model's vocabulary is smaller than the tokenizer's.
    """

    def __init__(self, subject: Subject, outcomes: OutcomeFile, *, seed: int = 0, quiet: bool = False) -> None:
        super().__init__()
        vocab_size = subject.model.config.vocab_size
        if vocab_size < subject.tokenizer.vocab_size:
            raise InvalidArgument(
                f"{subject.name} has a vocabulary of {vocab_size}; its tokenizer {subject.tokenizer.name} needs "
                f"{subject.tokenizer.vocab_size}"
            )
        self._subject, self._outcomes, self._seed = subject, outcomes, seed
        self._hidden = True if quiet else None  # None: shown on a terminal only

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Returns for each continuation its log-probability, and whether greedy generation would write it."""
        found = self._scores([self._encode_pair(*request.args) for request in requests])
        return [(score.log_probability, score.is_greedy) for score in found]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Returns the log-probability of each whole text, behind the end-of-document token."""
        pairs = [(self._end_of_document(), self._subject.tokenizer.encode(*request.args)) for request in requests]
        return [score.log_probability for score in self._scores(pairs)]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Returns what the model writes behind each context.

        Greedy generations share batches. Each other one is drawn alone, from a seed of its own that follows from the
        seed given, the context, the settings, and how many equal requests came before.
        """
        prompts = [self._subject.tokenizer.encode(request.args[0]) for request in requests]
        prompts = [prompt if len(prompt) else self._end_of_document() for prompt in prompts]
        wanted = [Generation.from_kwargs(request.args[1]) for request in requests]
        seen: Counter[str] = Counter()
        digests = []
        for prompt, how in zip(prompts, wanted, strict=True):
            settings = json.dumps(asdict(how))
            digest = _digest(settings.encode(), prompt.tobytes())
            if how.temperature:
                seen[digest] += 1
                digest = _digest(digest.encode(), f"{self._seed} {seen[digest]}".encode())
            digests.append(digest)
        groups: dict[object, dict[str, int]] = {}  # digest and number of prompts that may share a batch
        for number, (digest, how) in enumerate(zip(digests, wanted, strict=True)):
            if self._outcomes.get(self._key(digest)) is None:
                groups.setdefault(digest if how.temperature else how.max_new_tokens, {})[digest] = number
        with self._bar("generations", sum(map(len, groups.values()))) as bar:
            for group in groups.values():
                self._generate(group, prompts, wanted, bar)
        return [str(self._answer(digest)["text"]) for digest in digests]

    def _generate(
        self, group: dict[str, int], prompts: Sequence[TokenArray], wanted: Sequence[Generation], bar: Any
    ) -> None:
        digests, numbers = list(group), list(group.values())
        how = wanted[numbers[0]]
        sampling = Sampling(temperature=how.temperature, top_p=how.top_p, seed=int(digests[0][:15], 16))
        for batch in batches([len(prompts[number]) + how.max_new_tokens for number in numbers]):
            texts = generations(
                self._subject,
                [prompts[numbers[place]] for place in batch],
                [wanted[numbers[place]].until for place in batch],
                max_new_tokens=how.max_new_tokens,
                sampling=sampling,
            )
            self._outcomes.add(
                (self._key(digests[place]), {"text": text}) for place, text in zip(batch, texts, strict=True)
            )
            bar.update(len(batch))

    def _scores(self, pairs: Sequence[tuple[TokenArray, TokenArray]]) -> list[Score]:
        digests = [_digest(context.tobytes(), continuation.tobytes()) for context, continuation in pairs]
        asked = {
            digest: pair
            for digest, pair in zip(digests, pairs, strict=True)
            if self._outcomes.get(self._key(digest)) is None
        }
        texts, numbers = branches_of(list(asked.values()))
        names = list(asked)
        with self._bar("log-likelihoods", len(asked)) as bar:
            for batch in batches([text.longest for text in texts]):
                found = scores(self._subject, [texts[place] for place in batch])
                found_by_name = {
                    names[number]: score
                    for place, of_text in zip(batch, found, strict=True)
                    for number, score in zip(numbers[place], of_text, strict=True)
                }
                self._outcomes.add((self._key(name), asdict(score)) for name, score in found_by_name.items())
                bar.update(len(found_by_name))
        return [Score(**self._answer(digest)) for digest in digests]

    def _encode_pair(self, context: str, continuation: str) -> tuple[TokenArray, TokenArray]:
        """Returns the tokens of a context and of its continuation, which together are those of the text as a whole.

        White space at the context's end counts to the continuation, as everywhere in the harness; so does a token
        that reaches over the border.
        """
        whole = self._subject.tokenizer.encode(context + continuation)
        before = self._subject.tokenizer.encode(context.rstrip())[: len(whole)]
        differ = np.flatnonzero(before != whole[: len(before)])
        border = int(differ[0]) if len(differ) else len(before)
        return whole[:border] if border else self._end_of_document(), whole[border:]

    def _end_of_document(self) -> TokenArray:
        tokenizer = self._subject.tokenizer
        if tokenizer.separator is None:
            raise InvalidArgument(
                f"tokenizer {tokenizer.name} has no end-of-document token, which stands for an empty context"
            )
        return np.array([tokenizer.separator], token_dtype(tokenizer.vocab_size))

    def _bar(self, what: str, total: int) -> Any:
        return progress_bar(total, what, hidden=self._hidden or not total, leave=True)

    def _key(self, digest: str) -> dict[str, str]:
        return self._subject.key() | {"task": HARNESS, "request": digest}

    def _answer(self, digest: str) -> dict[str, Any]:
        found = self._outcomes.get(self._key(digest))
        assert found is not None
        return found


def _digest(*parts: bytes) -> str:
    """Returns a digest of several byte strings and of where each ends."""
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "big") + part for part in parts)).hexdigest()[:32]
