"""Batches are functions of (seed, step, rank), made ahead in order."""

import re
import threading
import warnings
from pathlib import Path

import pytest
import torch
from small_runs import small_run

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.data.documents import find_sources
from hsa_compile.model.data.manifest import VALIDATION
from hsa_compile.model.data.prepare import prepare
from hsa_compile.model.tasks.mixture import Mixture
from hsa_compile.model.training import feed as feed_module
from hsa_compile.model.training.config import RunConfig
from hsa_compile.model.training.config_file import from_dict
from hsa_compile.model.training.feed import (
    AHEAD,
    Feed,
    StepPlan,
    check_rows,
    held_out_mixture,
    lacks_text,
    make_batch,
    mixtures,
    open_corpus,
    plan_step,
    tokens_before,
)


def test_a_feed_that_begins_later_gives_the_same_batches() -> None:
    run = small_run()
    by_stage = mixtures(run, None)
    feed, later = Feed(run, by_stage), Feed(run, by_stage, first_step=2)
    batches = [feed.next() for _ in range(4)]
    assert [batch.plan.step for batch in batches] == [0, 1, 2, 3]
    assert {batch.plan.stage for batch in batches} == {0, 1}
    assert torch.equal(later.next().tokens, batches[2].tokens)
    assert not torch.equal(batches[0].tokens[0, :40], batches[0].tokens[1, :40])
    feed.close()
    later.close()


def test_processes_together_take_the_rows_of_one(tmp_path: Path) -> None:
    """However many groups of processes have rows of their own; a row's text and needles follow from its number."""
    (tmp_path / "text.txt").write_text("".join(f"line {number}\n" for number in range(400)))
    prepare(find_sources([tmp_path / "text.txt"]), tmp_path / "corpus", validation=0.0)
    stage = {"seq_len": 60, "batch_tokens": 300, "synthetic_share": 0.5, "min_distance": 0}
    run = from_dict({**small_run().to_dict(), "stages": [stage], "data": {"corpus": str(tmp_path / "corpus")}})
    mixture, plan = mixtures(run, open_corpus(run))[0], StepPlan(step=3, stage=0, length=60, num_rows=7)
    whole = make_batch(mixture, plan, seed=0)
    for groups in (2, 3, 4, 7):
        parts = [make_batch(mixture, plan, seed=0, rank=rank, world_size=groups) for rank in range(groups)]
        for name in ("tokens", "weights", "is_answer"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def shards(folder: Path, count: int) -> Path:
    """A corpus of so many shards with 20 lines each, all of them documents of their own."""
    for number in range(count):
        text = folder / f"{number}.jsonl"
        text.write_text("".join(f'{{"text": "line {number} {line} {"." * line}"}}\n' for line in range(20)))
        prepare(find_sources([text]), folder / "corpus" / str(number), validation=0.0)
    return folder / "corpus"


def test_shuffled_documents_come_once_an_epoch_however_a_run_is_cut(tmp_path: Path) -> None:
    """From many shards, in rows of several lengths: begun anew at any step, or divided among processes."""
    stages = [
        {"share": 0.4, "min_seq_len": 50, "seq_len": 70, "batch_tokens": 300, "synthetic_share": 0.0},
        {"share": 0.6, "seq_len": 90, "batch_tokens": 290, "synthetic_share": 0.0},
    ]
    data = {"corpus": str(shards(tmp_path, 30)), "order": "documents"}
    run = from_dict({**small_run(steps=60).to_dict(), "stages": stages, "data": data})
    corpus = open_corpus(run)
    assert corpus is not None
    by_stage = mixtures(run, corpus)
    plans = [plan_step(run, step) for step in range(60)]
    whole = batches(run, by_stage, 60)
    stream = torch.cat([tokens.flatten() for tokens in whole])
    assert len(stream) > len(corpus)
    documents = bytes(stream[: len(corpus)].tolist()).split(b"\0")[:-1]
    assert sorted(documents) == sorted(document.tobytes() for document in corpus.documents)
    for step in (1, 23, 24, 37):
        assert tokens_before(run, step) == sum(plan.num_rows * plan.length for plan in plans[:step])
        resumed = batches(run, mixtures(run, corpus), 60 - step, first_step=step)
        assert all(torch.equal(one, other) for one, other in zip(resumed, whole[step:], strict=True))
    parts = [batches(run, mixtures(run, corpus), 60, rank=rank, world_size=2) for rank in range(2)]
    assert all(torch.equal(torch.cat(both), one) for *both, one in zip(*parts, whole, strict=True))


def batches(run: RunConfig, by_stage: tuple[Mixture, ...], count: int, **options: int) -> list[torch.Tensor]:
    """The tokens of so many steps of a feed."""
    feed = Feed(run, by_stage, **options)
    found = [feed.next().tokens for _ in range(count)]
    feed.close()
    return found


def test_an_order_that_no_stage_uses_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"data.order = 'documents' is used by no stage"):
        from_dict({**small_run().to_dict(), "data": {"order": "documents"}})
    with pytest.raises(InvalidArgument, match=r"data.order .*windows, documents"):
        from_dict({**small_run().to_dict(), "data": {"order": "files"}})


def test_answers_are_marked_and_carry_their_weight() -> None:
    run = small_run()
    batch = make_batch(mixtures(run, None)[0], plan_step(run, 0), seed=0)
    assert batch.is_answer.any(dim=1).all()
    answers = bytes(batch.tokens[batch.is_answer].tolist())
    assert re.fullmatch(rb"([0-9]{4}\.)+", answers)  # the full stops that end them are among them
    assert (batch.weights[batch.is_answer] == 1).all()
    assert (batch.weights[:, 0] == 0).all()
    assert batch.sources is not None
    rows, places = (batch.sources >= 0).nonzero(as_tuple=True)
    assert bytes(batch.tokens[rows, places].tolist()) == answers
    sources = batch.sources[rows, places]
    assert (sources < places - 4).all()
    assert torch.equal(batch.tokens[rows, sources], batch.tokens[rows, places])


def test_an_error_in_the_thread_is_raised_where_the_batch_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise InvalidArgument("no such row")

    monkeypatch.setattr(feed_module, "training_sample", fail)
    feed = Feed(small_run(), mixtures(small_run(), None))
    with pytest.raises(InvalidArgument, match="no such row"):
        feed.next()
    feed.close()


def test_no_more_than_a_few_batches_are_made_ahead_and_the_thread_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = feed_module.make_batch
    monkeypatch.setattr(feed_module, "make_batch", lambda *a, **k: made.append(1) or real(*a, **k))
    feed = Feed(small_run(), mixtures(small_run(), None))
    feed.next()
    feed.close()
    assert len(made) <= AHEAD + 1
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())


def test_rows_too_short_for_needles_are_refused_before_the_run() -> None:
    run = small_run(stages=[{"seq_len": 30, "batch_tokens": 60}])
    message = r"stages\.0: rows of 30 are too short .* distance of 16; allowed is 38"
    with pytest.raises(InvalidArgument, match=message):
        check_rows(run, mixtures(run, None), 1)


def test_fewer_rows_than_processes_are_refused_before_the_run() -> None:
    run = small_run(stages=[{"seq_len": 60, "batch_tokens": 130}])
    check_rows(run, mixtures(run, None), 2)
    with pytest.raises(InvalidArgument, match=r"stages\.0\.batch_tokens = 130 must be at least 180"):
        check_rows(run, mixtures(run, None), 3)


def test_held_out_rows_come_from_the_last_stage() -> None:
    run = small_run()
    assert isinstance(held_out_mixture(run, None), Mixture)
    assert held_out_mixture(run, None).min_distance == 12


def test_held_out_rows_come_from_the_validation_split_or_from_no_text(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"text {number} " * 40)
    prepare(find_sources(sorted(tmp_path.glob("*.txt"))), tmp_path / "corpus", validation=0.5)
    text, needles = {"synthetic_share": 0.0}, {"haystacks": {"corpus": 1.0}, "min_distance": 0}
    for length, source, says in ((64, text, False), (10_000, text, True), (10_000, needles, True), (10_000, {}, False)):
        stage = {"seq_len": length, "batch_tokens": length, **source}
        values = {**small_run().to_dict(), "stages": [{**text, "seq_len": 64, "batch_tokens": 64}, stage]}
        run = from_dict({**values, "data": {"corpus": str(tmp_path / "corpus")}})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            held_out = held_out_mixture(run, open_corpus(run)).corpus
        assert held_out is not None
        assert held_out.split == VALIDATION
        assert ["held_out_loss is not measured" in str(warning.message) for warning in caught] == [True] * says
        assert lacks_text(run.stages[-1], held_out) is says
