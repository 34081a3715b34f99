"""A sample in a haystack that was read once gives the logits of the sample read as a whole."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import build, combinations, small_config

from hsa_compile.model.data.tokenizer import TokenArray
from hsa_compile.model.evaluation.edited_reading import (
    EditedReading,
    edited_chunks,
    num_reread,
    resume_position,
)
from hsa_compile.model.inference.inference import ModelState, extend, new_state, prefill
from hsa_compile.model.inference.snapshot import rewind, snapshot
from hsa_compile.model.tasks.haystack import Haystack, NoiseHaystack
from hsa_compile.model.tasks.retrieval import Asked, make_edits
from hsa_compile.model.tasks.sample import Edit, TaskPlan, TaskSample
from hsa_compile.model.transformer import HSATransformer

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")

TOLERANCE = 1e-4
FINITE = ["hsa-ultralong", "drt", "swa"]


def bytes_model(variant: str, **changes: object) -> HSATransformer:
    return build(small_config(variant, vocab_size=256, **changes))


def edits(
    task: str, *, length: int, seed: int, haystack: Haystack, depths: list[float]
) -> tuple[TokenArray, tuple[TaskPlan, ...]]:
    asked = [Asked(depth=depth, index=index) for index, depth in enumerate(depths)]
    return make_edits(task, length=length, seed=seed, haystack=haystack, asked=asked)


def logits_of(model: HSATransformer, sample: TaskSample, state: ModelState, num_read: int) -> torch.Tensor:
    """From the byte before the first answer to the end."""
    tokens = torch.from_numpy(sample.tokens[num_read:].astype(np.int64))[None]
    prompt = sample.answer_spans[0][0] - num_read
    first = prefill(model, tokens[:, :prompt], state)
    return torch.cat((first[:, None], extend(model, tokens[:, prompt:], state)), dim=1)


def whole_logits(model: HSATransformer, sample: TaskSample) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.from_numpy(sample.tokens.astype(np.int64))[None])
    return logits[:, sample.answer_spans[0][0] - 1 :]


def moved(plan: TaskPlan, starts: list[int]) -> TaskPlan:
    """The first needles at other places."""
    needles = tuple(replace(edit, start=start) for edit, start in zip(plan.needles, starts, strict=False))
    return replace(plan, needles=needles)


def edited_logits(reading: EditedReading, model: HSATransformer, sample: TaskSample) -> torch.Tensor:
    with reading.sample(sample) as state:
        return logits_of(model, sample, state, reading.num_read)


def read(model: HSATransformer, haystack: TokenArray, plan: TaskPlan, **memory: object) -> EditedReading:
    return EditedReading(model, haystack, plan.answer_spans[0][0], new_state(model, **memory))


@pytest.mark.parametrize(("name", "length"), combinations(FINITE, [240, 140, 403]))
def test_edits_give_the_logits_of_the_whole_sample(name: str, length: int) -> None:
    model = bytes_model(name)
    depths = [0.0, 0.21, 0.5, 0.83, 1.0]
    haystack, plans = edits("mq-niah", length=length, seed=3, haystack=NoiseHaystack(), depths=depths)
    reading = read(model, haystack, plans[0])
    for plan in plans:
        sample = plan.apply(haystack)
        torch.testing.assert_close(
            edited_logits(reading, model, sample), whole_logits(model, sample), rtol=0, atol=TOLERANCE
        )


@pytest.mark.parametrize(
    ("name", "starts"),
    combinations(
        FINITE,
        [
            [0, 10], [1, 40], [3, 100], [7, 18], [100, 111], [100, 125], [5, 250], [240, 252], [255, 265], [268, 278],
        ],
    ),
    ids=str,
)  # fmt: skip
def test_needles_anywhere_over_borders_of_chunks_and_side_by_side(name: str, starts: list[int]) -> None:
    model = bytes_model(name)
    haystack, (plan,) = edits(
        "mq-niah", length=311, seed=1, haystack=NoiseHaystack(), depths=[0.5]
    )  # fmt: skip
    reading = read(model, haystack, plan)
    sample = moved(plan, starts).apply(haystack)
    torch.testing.assert_close(
        edited_logits(reading, model, sample), whole_logits(model, sample), rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize(
    ("name", "changes"),
    combinations(FINITE, [{"num_lower_layers": 5}, {"num_lower_layers": 0}, {"window": 1}]),
    ids=str,
)
def test_other_sizes_of_the_lower_half(name: str, changes: dict[str, int]) -> None:
    model = bytes_model(name, **changes)
    haystack, plans = edits("s-niah", length=257, seed=2, haystack=NoiseHaystack(), depths=[0.02, 0.4, 0.97])
    reading = read(model, haystack, plans[0])
    for plan in plans:
        sample = plan.apply(haystack)
        torch.testing.assert_close(
            edited_logits(reading, model, sample), whole_logits(model, sample), rtol=0, atol=TOLERANCE
        )


@pytest.mark.parametrize("placement", ["device", "host", "disk"])
def test_the_haystack_is_there_again_afterwards(placement: str, tmp_path) -> None:
    model = bytes_model("hsa-ultralong")
    haystack, plans = edits("vt", length=300, seed=5, haystack=NoiseHaystack(), depths=[0.1, 0.9])
    state = new_state(model, memory=placement, directory=tmp_path)
    reading = EditedReading(model, haystack, plans[0].answer_spans[0][0], state)
    assert state.memory is not None
    count, reserved = state.memory.num_chunks[0], state.memory.pages.num_pages
    before = state.memory.read(0, 0, count)
    for plan in plans:
        edited_logits(reading, model, plan.apply(haystack))
        assert state.memory.num_chunks == [count]
        assert state.memory.pages.num_pages == reserved
        assert all(torch.equal(now, then) for now, then in zip(state.memory.read(0, 0, count), before, strict=True))


def test_the_haystack_is_there_again_after_an_error() -> None:
    model = bytes_model("hsa-ultralong")
    haystack, plans = edits("s-niah", length=300, seed=5, haystack=NoiseHaystack(), depths=[0.3, 0.6])
    reading = read(model, haystack, plans[0])
    with pytest.raises(KeyboardInterrupt), reading.sample(plans[0].apply(haystack)):
        raise KeyboardInterrupt
    sample = plans[1].apply(haystack)
    torch.testing.assert_close(
        edited_logits(reading, model, sample), whole_logits(model, sample), rtol=0, atol=TOLERANCE
    )


def test_only_what_an_edit_touches_is_read_again() -> None:
    model = bytes_model("hsa-ultralong")
    C, reach = model.config.chunk_size, model.config.lower_reach
    haystack, (plan,) = edits("s-niah", length=2000, seed=5, haystack=NoiseHaystack(), depths=[0.5])
    read(model, haystack, plan)
    position = resume_position(model, plan.answer_spans[0][0])
    assert position is not None
    needle = plan.needles[0]
    (first, last), *_ = edited_chunks(model, plan, position)
    assert first == needle.start // C
    assert last == (needle.end - 1 + reach) // C + 1
    assert num_reread(model, 1, 10, plan.length, plan.answer_spans[0][0]) < 200


def test_a_needle_in_the_tail_touches_no_chunk_before_it() -> None:
    model = bytes_model("hsa-ultralong")
    _, (plan,) = edits("s-niah", length=500, seed=5, haystack=NoiseHaystack(), depths=[1.0])
    position = resume_position(model, plan.answer_spans[0][0])
    assert position is not None
    assert (
        edited_chunks(model, replace(plan, needles=(Edit(start=position, tokens=tuple(b" abc=1234.")),)), position)
        == []
    )


def test_models_that_remember_without_end_are_read_as_a_whole() -> None:
    assert resume_position(bytes_model("ramba"), 10_000) is None
    assert resume_position(bytes_model("full"), 10_000) is None
    assert resume_position(bytes_model("swa"), 20) is None


def test_a_state_goes_back_to_a_point_many_times(variant: str) -> None:
    model = bytes_model(variant)
    tokens = torch.randint(256, (2, 90), generator=torch.Generator().manual_seed(0))
    other = torch.randint(256, (2, 31), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(tokens)
    state = new_state(model, batch=2)
    prefill(model, tokens[:, :60], state, piece=16)
    point = snapshot(state)
    for piece in (other, other[:, :1], tokens[:, 60:]):
        rewind(state, point)
        logits = extend(model, piece, state)
    torch.testing.assert_close(logits, whole[:, 60:], rtol=0, atol=TOLERANCE)
