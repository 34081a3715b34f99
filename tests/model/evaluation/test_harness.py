"""Answers to lm-evaluation-harness are those of one plain forward pass over each whole text."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from oracle import Oracle
from small_models import build, combinations, one_first, small_config

from hsa_compile.errors import HSACompileWarning, InvalidArgument, NotFinite
from hsa_compile.model.config import VARIANTS
from hsa_compile.model.data.tokenizer import BytesTokenizer, FileTokenizer
from hsa_compile.model.evaluation import continuations
from hsa_compile.model.evaluation import continuations as generations
from hsa_compile.model.evaluation.outcomes import OutcomeFile
from hsa_compile.model.evaluation.subject import Subject
from hsa_compile.model.inference.generate import generate

pytest.importorskip("lm_eval", reason="the extra harness is not installed")
from lm_eval.api.instance import Instance

from hsa_compile.model.evaluation import harness
from hsa_compile.model.evaluation.harness import Generation, HarnessModel

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")

LONG = "a context that is several windows long, é€😀 and all; " * 2
PAIRS = [
    ("Who?", " me"),
    ("Who?", " you and I"),
    (LONG, " yes"),
    (LONG, " no, never"),
    (LONG, " yes"),
    ("", "nothing before"),
    ("ends in white space \n", "here"),
    ("é", "ü"),
    ("short", " " + LONG),
]


def subject_of(variant: str, dtype: torch.dtype = torch.float64, **changes: object) -> Subject:
    model = build(small_config(variant, vocab_size=256, **changes), dtype)
    return Subject(name="small", model=model, tokenizer=BytesTokenizer())


@pytest.fixture
def outcomes(tmp_path: Path) -> Iterator[OutcomeFile]:
    with OutcomeFile(tmp_path / "out") as file:
        yield file


def asked(kind: str, arguments: Sequence[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


def plain(subject: Subject, context: bytes, continuation: bytes) -> tuple[float, bool]:
    """By one forward pass over the whole text."""
    tokens = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        logits = subject.model(tokens)[0, len(context) - 1 : -1].double()
    targets = tokens[0, len(context) :]
    total = logits.log_softmax(-1).gather(1, targets[:, None]).sum()
    return float(total), bool((logits.argmax(-1) == targets).all())


def split(context: str, continuation: str) -> tuple[bytes, bytes]:
    """As the harness splits: white space belongs to the continuation, byte 0 stands for nothing."""
    kept = context.rstrip()
    return kept.encode() or b"\0", (context[len(kept) :] + continuation).encode()


def close(dtype: torch.dtype = torch.float64) -> dict[str, float]:
    return {"rel": 1e-9} if dtype == torch.float64 else {"rel": 1e-4}


@pytest.mark.parametrize(("variant", "dtype"), combinations(VARIANTS, [torch.float64, torch.float32]))
def test_log_likelihoods_are_those_of_one_forward_pass(variant: str, dtype: torch.dtype, outcomes: OutcomeFile) -> None:
    subject = subject_of(variant, dtype)
    found = HarnessModel(subject, outcomes).loglikelihood(asked("loglikelihood", PAIRS))
    wanted = [plain(subject, *split(*pair)) for pair in PAIRS]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], **close(dtype))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_what_the_model_would_write_is_greedy(outcomes: OutcomeFile) -> None:
    oracle = Subject(name="oracle", model=Oracle(), tokenizer=BytesTokenizer())
    context = "far away abc=1234. and more ?abc="
    choices = ["1234.", "1", "1235.", "2234.", "1234!", ""]
    found = HarnessModel(oracle, outcomes).loglikelihood(asked("loglikelihood", [(context, each) for each in choices]))
    assert [greedy for _, greedy in found] == [True, True, False, False, False, True]
    assert found[-1] == (0.0, True)


@pytest.mark.parametrize("variant", one_first("drt"))
def test_rolling_takes_the_whole_text_however_long(variant: str, outcomes: OutcomeFile) -> None:
    subject = subject_of(variant)
    texts = [LONG * 3, "é", LONG, ""]
    found = HarnessModel(subject, outcomes).loglikelihood_rolling(asked("rolling", [(text,) for text in texts]))
    assert found == pytest.approx([plain(subject, b"\0", text.encode())[0] for text in texts], **close())


@pytest.mark.slow
def test_pieces_of_a_long_continuation_add_up(outcomes: OutcomeFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuations, "LOGITS", 256 * 5)
    subject = subject_of("hsa-ultralong")
    (found,) = HarnessModel(subject, outcomes).loglikelihood_rolling(asked("rolling", [(LONG,)]))
    assert found == pytest.approx(plain(subject, b"\0", LONG.encode())[0], **close())


def test_a_shared_context_is_read_once(outcomes: OutcomeFile, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = continuations.prefill

    def counted(model, tokens, *arguments, **options):
        read.append(tokens.numel())
        return real(model, tokens, *arguments, **options)

    monkeypatch.setattr(continuations, "prefill", counted)
    pairs = [(LONG, f" choice {number}") for number in range(5)]
    HarnessModel(subject_of("swa"), outcomes).loglikelihood(asked("loglikelihood", pairs))
    assert read == [len(LONG.rstrip().encode())]


@pytest.mark.parametrize("variant", one_first("swa"))
def test_alone_or_together_and_in_any_order_answers_are_the_same(variant: str, tmp_path: Path) -> None:
    subject = subject_of(variant)
    answers = {}
    for name, order in (("one way", PAIRS), ("the other", PAIRS[::-1])):
        with OutcomeFile(tmp_path / name) as file:
            found = HarnessModel(subject, file).loglikelihood(asked("loglikelihood", order))
        answers[name] = dict(zip(order, found, strict=True))
    for number, pair in enumerate(PAIRS):
        with OutcomeFile(tmp_path / f"alone {number}") as file:
            ((value, greedy),) = HarnessModel(subject, file).loglikelihood(asked("loglikelihood", [pair]))
        for name in answers:
            assert answers[name][pair] == (pytest.approx(value, **close()), greedy)


@pytest.mark.slow
def test_small_batches_give_the_same(outcomes: OutcomeFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuations, "MAX_ROWS", 2)
    subject = subject_of("hsa-ultralong")
    found = HarnessModel(subject, outcomes).loglikelihood(asked("loglikelihood", PAIRS))
    wanted = [plain(subject, *split(*pair))[0] for pair in PAIRS]
    assert [value for value, _ in found] == pytest.approx(wanted, **close())


def test_answers_that_are_kept_are_not_computed_again(outcomes: OutcomeFile, monkeypatch: pytest.MonkeyPatch) -> None:
    model = HarnessModel(subject_of("swa"), outcomes)
    before = model.loglikelihood(asked("loglikelihood", PAIRS))
    texts = model.generate_until(asked("generate_until", [("a", {"max_gen_toks": 3})]))
    assert len(outcomes) == len(set(PAIRS)) + 1

    def never(*_: object, **__: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(continuations, "prefill", never)
    monkeypatch.setattr(generations, "stream", never)
    assert model.loglikelihood(asked("loglikelihood", PAIRS)) == before
    assert model.generate_until(asked("generate_until", [("a", {"max_gen_toks": 3})])) == texts
    with pytest.raises(AssertionError, match="computed again"):
        HarnessModel(subject_of("full"), outcomes).loglikelihood(asked("loglikelihood", PAIRS))


def test_what_was_finished_before_an_interruption_is_kept(
    outcomes: OutcomeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = harness.scores

    def interrupted(subject, texts):
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(subject, texts)

    monkeypatch.setattr(continuations, "MAX_ROWS", 1)
    monkeypatch.setattr(harness, "scores", interrupted)
    model = HarnessModel(subject_of("swa"), outcomes)
    requests = asked("loglikelihood", [(f"text {number}", " goes on") for number in range(5)])
    with pytest.raises(KeyboardInterrupt):
        model.loglikelihood(requests)
    assert len(outcomes) == 2
    assert len(model.loglikelihood(requests)) == 5
    assert calls == [1] * 6


@pytest.mark.parametrize("variant", one_first("hsa-ultralong"))
def test_greedy_generation_is_that_of_the_model(variant: str, outcomes: OutcomeFile) -> None:
    subject = subject_of(variant, init_std=1.0)
    prompts = ["a", LONG, "", "and more"]
    found = HarnessModel(subject, outcomes).generate_until(
        asked("generate_until", [(prompt, {"until": [], "max_gen_toks": 12, "do_sample": False}) for prompt in prompts])
    )
    for prompt, text in zip(prompts, found, strict=True):
        tokens = generate(subject.model, torch.tensor(list(prompt.encode() or b"\0")), max_new_tokens=12)[0]
        assert text == bytes(tokens).partition(b"\0")[0].decode(errors="replace")


def test_a_stop_string_ends_a_text_before_it(outcomes: OutcomeFile) -> None:
    subject = subject_of("swa", init_std=1.0)
    model = HarnessModel(subject, outcomes)
    (whole,) = model.generate_until(asked("generate_until", [("a", {"max_gen_toks": 30})]))
    assert len(whole) > 6
    settings = [{"until": [whole[3:5], "never", ""], "max_gen_toks": 30}, {"until": whole[5], "max_gen_toks": 30}]
    found = model.generate_until(asked("generate_until", [("a", each) for each in settings]))
    assert found == [whole.split(whole[3:5])[0], whole.split(whole[5])[0]]


@pytest.mark.slow
def test_what_is_drawn_differs_from_repeat_to_repeat_and_not_from_run_to_run(tmp_path: Path) -> None:
    subject = subject_of("swa")
    how = {"until": ["\n\n"], "max_gen_toks": 20, "temperature": 1.0, "top_p": 0.95}
    requests = asked("generate_until", [("a", how), ("b", how), ("a", how)])
    found = []
    for run, (seed, order) in enumerate(((0, (0, 1, 2)), (0, (1, 0, 2)), (1, (0, 1, 2)))):
        with OutcomeFile(tmp_path / str(run)) as file:
            texts = HarnessModel(subject, file, seed=seed).generate_until([requests[place] for place in order])
        found.append(dict(zip(order, texts, strict=True)))
    assert found[0] == found[1]
    assert found[0] != found[2]
    assert found[0][0] != found[0][2]


@pytest.mark.parametrize(
    ("kwargs", "wanted"),
    [
        ({}, Generation(until=(), max_new_tokens=256, temperature=0.0, top_p=1.0)),
        ({"until": "\n", "max_tokens": 7}, Generation(until=("\n",), max_new_tokens=7, temperature=0.0, top_p=1.0)),
        (
            {"temperature": 0.7, "top_p": 0.9, "max_gen_toks": 5, "max_new_tokens": 9},
            Generation(until=(), max_new_tokens=5, temperature=0.7, top_p=0.9),
        ),
        (
            {"do_sample": False, "temperature": 0.7, "top_p": 0.9},
            Generation(until=(), max_new_tokens=256, temperature=0.0, top_p=1.0),
        ),
        ({"do_sample": True}, Generation(until=(), max_new_tokens=256, temperature=1.0, top_p=1.0)),
    ],
)
def test_settings_of_a_task_are_read(kwargs: dict, wanted: Generation) -> None:
    assert Generation.from_kwargs(kwargs) == wanted


def test_settings_that_mean_nothing_here_are_warned_of() -> None:
    with pytest.warns(HSACompileWarning, match="generation ignores top_k, num_beams;"):
        Generation.from_kwargs({"top_k": 5, "num_beams": 2, "until": None})


def test_words_that_join_over_the_border_belong_to_the_continuation(outcomes: OutcomeFile, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="the extra train is not installed")
    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2, "c": 3, "bc": 4, " ": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[("b", "c")]))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = build(small_config("hsa-ultralong"), torch.float64)
    subject = Subject(name="small", model=model, tokenizer=FileTokenizer(tmp_path / "tokenizer.json"))
    found = HarnessModel(subject, outcomes).loglikelihood(
        asked("loglikelihood", [("aab", "c"), ("a ", "b"), ("b", "ca"), ("aab", "")])
    )
    wanted = [plain(subject, *each) for each in ((b"\1\1", b"\4"), (b"\1", b"\5\2"), (b"\0", b"\4\1"))]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted] + [0.0], **close())


def test_a_tokenizer_that_does_not_fit_is_refused(outcomes: OutcomeFile, tmp_path: Path) -> None:
    subject = Subject(name="small", model=build(small_config("swa")), tokenizer=BytesTokenizer())
    with pytest.raises(InvalidArgument, match="small has a vocabulary of 19; its tokenizer bytes needs 256"):
        HarnessModel(subject, outcomes)


def test_without_an_end_of_document_an_empty_context_is_refused(
    outcomes: OutcomeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BytesTokenizer, "separator", None)
    model = HarnessModel(subject_of("swa"), outcomes)
    with pytest.raises(InvalidArgument, match="tokenizer bytes has no end-of-document token"):
        model.loglikelihood(asked("loglikelihood", [("", "a")]))
    assert len(model.loglikelihood(asked("loglikelihood", [("a", "b")]))) == 1


def test_what_is_not_finite_is_no_likelihood(outcomes: OutcomeFile) -> None:
    subject = subject_of("swa")
    with torch.no_grad():
        subject.model.norm.weight.fill_(float("nan"))
    asking = HarnessModel(subject, outcomes, quiet=True)
    with pytest.raises(NotFinite, match="the log-probabilities of continuations are"):
        asking.loglikelihood(asked("loglikelihood", [("a", "b")]))
    with pytest.raises(NotFinite, match="the logits of new token 0 of text 0"):
        asking.generate_until(asked("generate_until", [("a", {"max_gen_toks": 2})]))
    assert len(outcomes) == 0
