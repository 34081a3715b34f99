"""Which samples a cell has, what a right answer is, and that nothing is computed twice."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import Oracle
from small_models import build, combinations, small_config

from hsa_compile.errors import InvalidArgument, NotFinite
from hsa_compile.model.config import GREEDY, TEACHER_FORCED, VARIANTS
from hsa_compile.model.data.tokenizer import BytesTokenizer
from hsa_compile.model.evaluation import retrieval
from hsa_compile.model.evaluation.cells import Cell, mean_of, retrieval_cells
from hsa_compile.model.evaluation.outcomes import OutcomeFile
from hsa_compile.model.evaluation.retrieval import retrieval_jobs
from hsa_compile.model.evaluation.settings import RetrievalSettings, least_length
from hsa_compile.model.evaluation.subject import Subject, run_jobs
from hsa_compile.model.tasks.family import TASKS, haystack_of, sizes
from hsa_compile.model.tasks.haystack import TextHaystack
from hsa_compile.model.tasks.retrieval import Asked
from hsa_compile.model.transformer import HSATransformer

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")


TEXT = TextHaystack("text", b"some words of a text, with a few numbers such as 12 and 345\n" * 50)


def subject_of(model: HSATransformer, **changes: object) -> Subject:
    return Subject(name="model", model=model.eval(), tokenizer=BytesTokenizer(), **changes)


def settings_of(**changes: object) -> RetrievalSettings:
    values = {"tasks": ("s-niah",), "lengths": (200,), "depths": (0.0, 0.5, 1.0), "num_samples": 2,
              "protocols": (TEACHER_FORCED, GREEDY)} | changes  # fmt: skip
    return RetrievalSettings(**values)


def evaluate(model: HSATransformer, settings: RetrievalSettings, out: Path) -> list[Cell]:
    subject = subject_of(model)
    with OutcomeFile(out) as outcomes:
        run_jobs(model, retrieval_jobs(subject, settings, TEXT, outcomes), lambda label, tokens: None)
        return retrieval_cells(subject, settings, TEXT, outcomes)


@pytest.mark.parametrize("task", TASKS)
def test_a_model_that_knows_is_always_right(task: str, tmp_path: Path) -> None:
    cells = evaluate(Oracle(), settings_of(tasks=(task,), lengths=(max(300, sizes(task).least),)), tmp_path)
    assert {cell.accuracy for cell in cells} == {1.0}
    has_depth = TASKS[task].has_depth
    assert [cell.depth for cell in cells] == 2 * ([0.0, 0.5, 1.0, None] if has_depth else [None])
    assert [cell.num_samples for cell in cells] == 2 * ([2, 2, 2, 6] if has_depth else [6])


@pytest.mark.parametrize(("variant", "task"), combinations(VARIANTS, list(TASKS)))
def test_an_untrained_model_is_never_right(variant: str, task: str, tmp_path: Path) -> None:
    model = build(small_config(variant, vocab_size=256))
    settings = settings_of(tasks=(task,), lengths=(max(200, sizes(task).least),), depths=(0.3,))
    assert {cell.num_correct for cell in evaluate(model, settings, tmp_path)} == {0}


def test_greedy_asks_for_the_end_of_the_answer_too(tmp_path: Path) -> None:
    cells = evaluate(Oracle(stops=False), settings_of(), tmp_path)
    assert {(cell.protocol, cell.accuracy) for cell in cells} == {(TEACHER_FORCED, 1.0), (GREEDY, 0.0)}


def test_cells_tell_depths_apart(tmp_path: Path) -> None:
    cells = evaluate(Oracle(blind_after=200), settings_of(lengths=(400,), depths=(0.0, 0.2, 0.9)), tmp_path)
    assert {cell.depth: cell.accuracy for cell in cells if cell.depth is not None} == {0.0: 1.0, 0.2: 1.0, 0.9: 0.0}
    assert [cell.accuracy for cell in cells if cell.depth is None] == 2 * [pytest.approx(2 / 3)]


def test_a_finished_sample_is_never_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = count_samples(monkeypatch)
    settings = settings_of(lengths=(200, 300))
    first = evaluate(Oracle(), settings, tmp_path)
    assert sum(asked) == 12
    assert evaluate(Oracle(), settings, tmp_path) == first
    assert sum(asked) == 12
    evaluate(Oracle(), dataclasses.replace(settings, num_samples=3, depths=(0.5, 0.7)), tmp_path)
    assert sum(asked) == 12 + 2 * (1 + 3)


def test_another_model_seed_or_distance_is_asked_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = count_samples(monkeypatch)
    for settings in (settings_of(), settings_of(seed=1), settings_of(min_distance=9)):
        evaluate(Oracle(), settings, tmp_path)
    evaluate(Oracle(seed=1), settings_of(), tmp_path)
    assert asked == 8 * [3]


def test_an_interrupted_evaluation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = count_samples(monkeypatch, fail_at=3)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Oracle(), settings_of(lengths=(200, 300)), tmp_path)
    before = sum(asked)
    with OutcomeFile(tmp_path) as outcomes:
        assert len(outcomes) == 2 * before == 12
    cells = evaluate(Oracle(), settings_of(lengths=(200, 300)), tmp_path)
    assert sum(asked) == 12
    assert len(cells) == 16


def count_samples(monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> list[int]:
    """How many samples each call asks for; that of the number given is interrupted."""
    asked: list[int] = []
    real = retrieval.answered

    def counted(model, state, samples, *rest):
        if len(asked) + 1 == fail_at:
            monkeypatch.setattr(retrieval, "answered", forever)
            raise KeyboardInterrupt
        return forever(model, state, samples, *rest)

    def forever(model, state, samples, *rest):
        asked.append(len(samples))
        return real(model, state, samples, *rest)

    monkeypatch.setattr(retrieval, "answered", counted)
    return asked


def spy_on_samples(monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[bytes]]:
    seen: list[bytes] = []
    real = retrieval.answered

    def spied(model, state, samples, *rest):
        seen.extend(sample.tokens.tobytes() for sample in samples)
        return real(model, state, samples, *rest)

    def take() -> set[bytes]:
        taken = set(seen)
        assert len(taken) == len(seen)
        seen.clear()
        return taken

    monkeypatch.setattr(retrieval, "answered", spied)
    return take


@pytest.mark.slow
def test_all_models_get_the_same_samples_whatever_else_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = spy_on_samples(monkeypatch)
    settings = settings_of(lengths=(1200,), num_samples=2, tasks=("mq-niah",), protocols=(TEACHER_FORCED,))
    edited = build(small_config("hsa-ultralong", vocab_size=256))
    assert retrieval_jobs_tokens(edited, settings, tmp_path) < 6 * 1200  # not read as wholes
    evaluate(edited, settings, tmp_path)
    expected = take()
    assert len(expected) == 6
    assert retrieval_jobs_tokens(build(small_config("ramba", vocab_size=256)), settings, tmp_path) == 6 * 1200
    evaluate(build(small_config("ramba", vocab_size=256)), settings, tmp_path)
    assert take() == expected
    other = build(small_config("swa", vocab_size=256))
    evaluate(other, dataclasses.replace(settings, depths=(1.0,), num_samples=1), tmp_path)
    evaluate(other, settings, tmp_path)
    assert take() == expected


def retrieval_jobs_tokens(model: HSATransformer, settings: RetrievalSettings, out: Path) -> int:
    with OutcomeFile(out) as outcomes:
        return sum(job.tokens for job in retrieval_jobs(subject_of(model), settings, TEXT, outcomes))


def test_the_progress_of_jobs_adds_up(tmp_path: Path) -> None:
    model = build(small_config("hsa-ultralong", vocab_size=256))
    told: list[int] = []
    with OutcomeFile(tmp_path) as outcomes:
        jobs = retrieval_jobs(subject_of(model), settings_of(lengths=(200, 900)), TEXT, outcomes)
        run_jobs(model, jobs, lambda label, tokens: told.append(tokens))
    assert sum(told) == sum(job.tokens for job in jobs)
    assert sum(tokens > 0 for tokens in told) > len(jobs)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("distance", [0, 13])
def test_the_least_length_is_enough_at_every_depth(task: str, distance: int) -> None:
    least = least_length(task, distance)
    depths = tuple(np.linspace(0, 1, 41))
    settings = settings_of(tasks=(task,), lengths=(least,), depths=depths, min_distance=distance)
    pending = tuple(retrieval._Pending(asked=Asked(depth=depth, index=0), keys={}) for depth in depths)
    group = retrieval._Group(
        subject=subject_of(Oracle()), settings=settings, haystack=haystack_of(task, TEXT), task=task, length=least,
        number=0, pending=pending,
    )  # fmt: skip
    _, plans = group.plans()
    assert len(plans) == 41
    with pytest.raises(InvalidArgument, match=f"length {least - 1} is too short for {task}; the least .* {least}"):
        settings_of(tasks=(task,), lengths=(least - 1,), min_distance=distance)


def test_a_model_of_other_tokens_is_refused(tmp_path: Path) -> None:
    with (
        OutcomeFile(tmp_path) as outcomes,
        pytest.raises(InvalidArgument, match="in the 256 tokens of bytes; the vocab"),
    ):
        retrieval_jobs(subject_of(build(small_config("swa"))), settings_of(), TEXT, outcomes)


def test_cells_tell_where_in_their_chunk_needles_begin_and_which_are_cut(tmp_path: Path) -> None:
    settings = settings_of(lengths=(900,), num_samples=16, protocols=(TEACHER_FORCED,))
    subject = subject_of(Oracle(blind_after=500))
    size = subject.model.config.chunk_size
    cells = evaluate(subject.model, settings, tmp_path)
    assert [bool(cell.by_offset) for cell in cells] == [False, False, False, True]
    every = cells[-1]
    assert set(every.by_offset) == set(range(size))
    assert sum(samples for samples, _ in every.by_offset.values()) == every.num_samples == 48
    assert sum(right for _, right in every.by_offset.values()) == every.num_correct < 48
    over_a_border = [counts for offset, counts in every.by_offset.items() if offset + 10 > size]
    assert every.cut == tuple(map(sum, zip(*over_a_border, strict=True)))


def test_the_mean_counts_each_task_the_same() -> None:
    few, many = (
        Cell(task="vt", haystack="noise", protocol=GREEDY, length=9, depth=None, num_samples=samples, num_correct=right)
        for samples, right in ((4, 4), (100, 50))
    )
    mean = mean_of([few, many])
    assert (mean.accuracy, mean.num_tasks) == (0.75, 2)
    assert 0.5 < mean.interval[0] < few.interval[0] / 2 + 0.25
    assert mean.interval[1] == pytest.approx(0.75 + (many.interval[1] - 0.5) / 2)
    assert mean_of([many]).interval == pytest.approx(many.interval)


@pytest.mark.parametrize("protocol", [TEACHER_FORCED, GREEDY])
def test_logits_that_are_not_finite_within_an_answer_are_no_answer(
    protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = retrieval.extend

    def broken(*arguments: Any) -> Any:
        return real(*arguments) * float("nan")

    monkeypatch.setattr(retrieval, "extend", broken)
    with pytest.raises(NotFinite, match="the logits of new token 1 of text 0 hold nan"):
        evaluate(build(small_config("swa", vocab_size=256)), settings_of(protocols=(protocol,)), tmp_path)
    with OutcomeFile(tmp_path) as outcomes:
        assert len(outcomes) == 0
