"""Perplexity by context length: the same last tokens of the same texts, with more and more before them."""

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from hsa_compile.errors import HSACompileWarning, InvalidArgument, NotFinite, warn_user
from hsa_compile.model.config import PERPLEXITY
from hsa_compile.model.data.corpus import TokenCorpus
from hsa_compile.model.data.manifest import MANIFEST, VALIDATION
from hsa_compile.model.data.prepare import stdlib_corpus
from hsa_compile.model.data.tokenizer import BYTES, TokenArray
from hsa_compile.model.evaluation.outcomes import Key, OutcomeFile, Values
from hsa_compile.model.evaluation.settings import length_label
from hsa_compile.model.evaluation.subject import Job, Subject, num_rows, piece_of
from hsa_compile.model.inference.inference import extend, prefill
from hsa_compile.model.tasks.haystack import STDLIB
from hsa_compile.model.tasks.unseen import PACKAGES

SCORED = 512  # how many last tokens of each text count; fewer where half the shortest context is less
LOGITS = 2**24  # how many logits are computed at once


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Texts:
    """Held-out texts, all as long as the longest context.

    Attributes:
        name: the name of where they come from.
        rows: the texts, `[longest]` each.
        are_documents: whether each lies within one document; otherwise the split's documents were joined.
        num_scored: how many last tokens of each have their loss taken.
        lengths: lengths of the contexts, ascending, scored tokens included.
    """

    name: str
    rows: tuple[TokenArray, ...]
    are_documents: bool
    num_scored: int
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """The perplexity at one context length.

    Attributes:
        text: where the texts come from.
        are_documents: whether each text lies within one document.
        length: the length of the context, scored tokens included.
        num_texts: how many texts were read.
        num_scored: how many tokens of each count.
        perplexity: e to the mean loss a token.
        standard_error: the standard error of the perplexity, over texts; None with a single one.
        bits_per_byte: bits that a byte of the scored text takes.
        change: by what share the perplexity exceeds that of the shortest context; negative where more context helps.
        change_error: standard error of `change`, over the differences of each text from itself, which vary far less
            than texts do; None with a single one.
    """

    text: str
    are_documents: bool
    length: int
    num_texts: int
    num_scored: int
    perplexity: float
    standard_error: float | None
    bits_per_byte: float
    change: float
    change_error: float | None

    @property
    def source(self) -> str:
        """What was read, in words."""
        return f"{'documents' if self.are_documents else 'texts of joined documents'} of {self.text}"


def open_texts(subject: Subject, source: str, lengths: Sequence[int], num_texts: int) -> Texts:
    """Opens texts that training does not see: those of the validation split of a corpus.

    They are documents where enough are as long as the longest context. Otherwise the split's documents are joined, with
    their separators between them, and cut at places spread evenly, as many as leave the scored tokens apart.

    Args:
        subject: the model whose tokens they must be.
        source: `stdlib`, which also stands for `packages`, or a prepared corpus.
        lengths: lengths of contexts in tokens, 2 or more.
        num_texts: the most texts.

    Raises:
        InvalidArgument: there is no such corpus, its tokens are others, or it holds less than the shortest context;
            contexts that are longer than it are left out with a warning.
    """
    if min(lengths) < 2:
        raise InvalidArgument(f"length {min(lengths)} is too short for {PERPLEXITY}; the least allowed is 2")
    corpus = _corpus(source)
    if corpus.tokenizer().digest != subject.tokenizer.digest:
        raise InvalidArgument(
            f"{corpus.directory} has tokenizer {corpus.tokenizer().name}; that of {subject.name} is "
            f"{subject.tokenizer.name}"
        )
    if corpus.manifest.vocab_size > subject.model.config.vocab_size:
        raise InvalidArgument(
            f"{corpus.directory} has a vocabulary of {corpus.manifest.vocab_size}; that of {subject.name} is "
            f"{subject.model.config.vocab_size}"
        )
    fitting = sorted({length for length in lengths if length <= len(corpus)})
    if not fitting:
        raise InvalidArgument(
            f"length {min(lengths)} is more than the validation split of {corpus.directory} has; {len(corpus)} tokens "
            "are the most allowed"
        )
    if too_long := sorted({length for length in lengths if length > len(corpus)}):
        left_out = ", ".join(map(length_label, too_long))
        warn_user(
            f"{PERPLEXITY} is left out at {left_out}: the validation split of {corpus.directory} has {len(corpus)} "
            "tokens",
            HSACompileWarning,
        )
    longest, num_scored = fitting[-1], min(SCORED, fitting[0] // 2)
    enough = np.flatnonzero(corpus.documents.lengths >= longest)
    if are_documents := len(enough) >= num_texts:
        chosen = enough[np.linspace(0, len(enough) - 1, num_texts).round().astype(int)]
        rows = [corpus.documents[int(number)][-longest:] for number in chosen]
    else:
        count = min(num_texts, 1 + (len(corpus) - longest) // num_scored)
        ends = np.linspace(longest, len(corpus), count).round().astype(int) if count > 1 else [longest]
        rows = [corpus.tokens[end - longest : end] for end in ends]
    return Texts(
        name=STDLIB if source in (PACKAGES, STDLIB) else corpus.directory.name,
        rows=tuple(rows),
        are_documents=are_documents,
        num_scored=num_scored,
        lengths=tuple(fitting),
    )


def perplexity_jobs(subject: Subject, texts: Texts, outcomes: OutcomeFile) -> list[Job]:
    """Returns what is not in the file of outcomes yet, one job a batch."""
    jobs = []
    for length in texts.lengths:
        rows = [row[-length:] for row in texts.rows]
        missing = [row for row in rows if outcomes.get(_key(subject, row, texts.num_scored)) is None]
        most = max(1, LOGITS // (texts.num_scored * subject.model.config.vocab_size))
        size = min(num_rows(length), most)
        for begin in range(0, len(missing), size):
            part = missing[begin : begin + size]
            jobs.append(
                Job(
                    label=f"{PERPLEXITY} {length_label(length)}",
                    tokens=len(part) * length,
                    run=functools.partial(_score, subject, part, texts.num_scored, outcomes),
                )
            )
    return jobs


def perplexities(subject: Subject, texts: Texts, outcomes: OutcomeFile) -> list[Perplexity]:
    """Returns the perplexities by length, ascending, of those lengths for which every text is in the file."""
    found: dict[int, list[Values]] = {}
    for length in texts.lengths:
        values = [outcomes.get(_key(subject, row[-length:], texts.num_scored)) for row in texts.rows]
        known = [value for value in values if value is not None]
        if len(known) == len(texts.rows):
            found[length] = known
    return [_summary(texts, length, values, next(iter(found.values()))) for length, values in found.items()]


def _summary(texts: Texts, length: int, values: Sequence[Values], shortest: Sequence[Values]) -> Perplexity:
    losses, before = (np.array([value["loss"] for value in each]) for each in (values, shortest))  # nats of each text
    num_bytes = sum(value["bytes"] for value in values)
    means, differences = losses / texts.num_scored, (losses - before) / texts.num_scored
    perplexity, ratio = math.exp(means.mean()), math.exp(differences.mean())
    error = change_error = None
    if len(values) > 1:
        error = perplexity * _standard_error(means)
        change_error = ratio * _standard_error(differences)
    return Perplexity(
        text=texts.name,
        are_documents=texts.are_documents,
        length=length,
        num_texts=len(values),
        num_scored=texts.num_scored,
        perplexity=perplexity,
        standard_error=error,
        bits_per_byte=float(losses.sum()) / math.log(2) / num_bytes,
        change=ratio - 1,
        change_error=change_error,
    )


def _standard_error(values: npt.NDArray[np.float64]) -> float:
    """Returns the standard error of the mean."""
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def _score(subject: Subject, rows: Sequence[TokenArray], num_scored: int, outcomes: OutcomeFile) -> None:
    model = subject.model
    tokens = torch.from_numpy(np.stack(rows).astype(np.uint8 if rows[0].dtype == np.uint8 else np.int64))
    state = subject.new_state(len(rows))
    before = tokens.shape[1] - num_scored
    first = prefill(model, tokens[:, :before], state, piece=piece_of(len(rows)))
    rest = extend(model, tokens[:, before:-1].to(model.device), state)
    losses = _losses(torch.cat((first[:, None], rest), dim=1), tokens[:, before:])
    if not all(map(math.isfinite, losses)):
        raise NotFinite(f"the losses of {subject.name} on texts of {tokens.shape[1]} tokens are {losses}")
    outcomes.add(
        (_key(subject, row, num_scored), {"loss": loss, "bytes": _num_bytes(subject, row[-num_scored:])})
        for row, loss in zip(rows, losses, strict=True)
    )


def _losses(logits: Tensor, tokens: Tensor) -> list[float]:
    """Returns the sums over each row, in nats."""
    targets = tokens.to(logits.device, torch.int64)
    loss = F.cross_entropy(logits.double().transpose(1, 2), targets, reduction="none")
    return [float(value) for value in loss.sum(dim=1)]


def _num_bytes(subject: Subject, tokens: TokenArray) -> int:
    return len(tokens) if subject.tokenizer.digest == BYTES else len(subject.tokenizer.decode(tokens).encode())


def _key(subject: Subject, row: TokenArray, num_scored: int) -> Key:
    digest = hashlib.sha256(np.ascontiguousarray(row).tobytes()).hexdigest()[:16]
    key: dict[str, Any] = {"task": PERPLEXITY, "length": len(row), "scored": num_scored, "text_digest": digest}
    return subject.key() | key


def _corpus(source: str) -> TokenCorpus:
    if source in (PACKAGES, STDLIB):
        return stdlib_corpus(VALIDATION)
    if not (Path(source) / MANIFEST).exists():
        raise InvalidArgument(
            f"{PERPLEXITY} reads the validation split of a corpus, and {source} is none; allowed are stdlib and a "
            "folder that hsa-compile prepare wrote"
        )
    return TokenCorpus(source, split=VALIDATION)
