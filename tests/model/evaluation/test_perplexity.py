"""Perplexity: the right tokens, the right sums, the same for every context."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import build, one_first, small_config

from hsa_compile.errors import HSACompileWarning, InvalidArgument
from hsa_compile.model.data.corpus import TokenCorpus
from hsa_compile.model.data.documents import find_sources
from hsa_compile.model.data.prepare import prepare
from hsa_compile.model.data.tokenizer import BytesTokenizer
from hsa_compile.model.evaluation import perplexity
from hsa_compile.model.evaluation.outcomes import OutcomeFile
from hsa_compile.model.evaluation.perplexity import Perplexity, Texts, open_texts, perplexities, perplexity_jobs
from hsa_compile.model.evaluation.subject import Subject, run_jobs

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")


def subject_of(variant: str = "swa", **changes: object) -> Subject:
    model = build(small_config(variant, vocab_size=256, **changes))
    return Subject(name="model", model=model, tokenizer=BytesTokenizer())


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """Documents of 100, 200 … 900 bytes, all held out but very few."""
    folder = tmp_path / "text"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for size in range(100, 1000, 100):
        (folder / f"{size}.txt").write_bytes(bytes(generator.integers(97, 123, size, dtype=np.uint8)))
    prepare(find_sources([folder]), tmp_path / "corpus", validation=0.999)
    return str(tmp_path / "corpus")


def test_bytes_are_those_of_the_text_and_not_its_tokens() -> None:
    class Letters:
        """Two letters a token, of which there are few."""

        digest = "letters"

        def decode(self, tokens: np.ndarray) -> str:
            return "ab" * len(tokens)

    tokens = np.zeros(5, np.uint8)
    assert perplexity._num_bytes(subject_of(), tokens) == 5
    other = Subject(name="m", model=subject_of().model, tokenizer=Letters())
    assert perplexity._num_bytes(other, tokens) == 10
    assert other.key() == subject_of().key() | {"tokenizer": "letters"}  # its results are no others'


def measure(subject: Subject, texts: Texts, out: Path) -> list[Perplexity]:
    with OutcomeFile(out) as outcomes:
        run_jobs(subject.model, perplexity_jobs(subject, texts, outcomes), lambda label, tokens: None)
        return perplexities(subject, texts, outcomes)


@pytest.mark.parametrize("variant", one_first("hsa-ultralong"))
def test_it_is_that_of_the_whole_forward(variant: str, corpus: str, tmp_path: Path) -> None:
    subject = subject_of(variant)
    texts = open_texts(subject, corpus, [40, 150], 3)
    found = measure(subject, texts, tmp_path / "out")
    assert [each.length for each in found] == [40, 150]
    losses = []
    for each in found:
        tokens = torch.from_numpy(np.stack([row[-each.length :] for row in texts.rows]).astype(np.int64))
        with torch.no_grad():
            logits = subject.model(tokens)[:, -21:-1]
        loss = F.cross_entropy(logits.transpose(1, 2), tokens[:, -20:], reduction="none").mean(dim=1)
        assert each.num_scored == 20
        assert each.perplexity == pytest.approx(math.exp(loss.mean()), rel=1e-4)
        assert each.bits_per_byte == pytest.approx(float(loss.mean()) / math.log(2), rel=1e-4)
        error = math.exp(loss.mean()) * float(loss.std()) / math.sqrt(3)
        assert each.standard_error == pytest.approx(error, rel=1e-3)
        losses.append(loss)
        ratio, difference = math.exp((loss - losses[0]).mean()), (loss - losses[0]).std()
        assert each.change == pytest.approx(ratio - 1, abs=1e-5)
        assert each.change_error == pytest.approx(ratio * float(difference) / math.sqrt(3), abs=1e-5)


def test_the_last_tokens_are_those_of_every_context(corpus: str) -> None:
    texts = open_texts(subject_of(), corpus, [400, 64], 2)
    assert texts.lengths == (64, 400)
    assert texts.num_scored == 32
    assert texts.are_documents
    assert {len(row) for row in texts.rows} == {400}
    ends = {path.read_bytes()[-400:] for path in (Path(corpus).parent / "text").iterdir()}
    assert all(row.tobytes() in ends for row in texts.rows)


def test_the_standard_library_is_read_where_training_does_not(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "stdlib_corpus", lambda split: TokenCorpus(corpus, split=split))
    found, expected = (open_texts(subject_of(), source, [64, 400], 2).rows for source in ("stdlib", corpus))
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_documents_are_joined_where_too_few_are_long_enough(corpus: str) -> None:
    texts = open_texts(subject_of(), corpus, [40, 2000], 3)
    assert not texts.are_documents
    assert len({row.tobytes() for row in texts.rows}) == 3
    assert {len(row) for row in texts.rows} == {2000}


def test_joined_texts_never_score_a_token_twice(corpus: str) -> None:
    texts = open_texts(subject_of(), corpus, [1200, 4000], 100)
    assert texts.num_scored == 512
    assert len(texts.rows) == 1 + (len(TokenCorpus(corpus, split="validation")) - 4000) // 512


def test_a_finished_text_is_not_read_again(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of()
    first = measure(subject, open_texts(subject, corpus, [40, 150], 2), tmp_path / "out")
    monkeypatch.setattr(perplexity, "_score", None)
    assert measure(subject, open_texts(subject, corpus, [40, 150], 2), tmp_path / "out") == first


def test_contexts_longer_than_the_text_are_left_out(corpus: str) -> None:
    with pytest.warns(HSACompileWarning, match="ppl is left out at 64K, 1M"):
        texts = open_texts(subject_of(), corpus, [40, 2**20, 2**16], 2)
    assert texts.lengths == (40,)
    with pytest.raises(InvalidArgument, match="length 65536 is more than the validation split"):
        open_texts(subject_of(), corpus, [2**16], 2)


def test_bad_sources_are_named(corpus: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="too short for ppl"):
        open_texts(subject_of(), corpus, [1], 2)
    with pytest.raises(InvalidArgument, match="reads the validation split of a corpus"):
        open_texts(subject_of(), str(tmp_path), [40], 2)
