"""`generate` of `transformers` on the chunk memory: the same tokens and logits as without a cache, read once."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import build, one_first, small_config
from torch import Tensor

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.config import VARIANTS
from hsa_compile.model.inference.inference import extend, new_state, prefill
from hsa_compile.model.inference.reading import load_state, save_state
from hsa_compile.model.inference.snapshot import snapshot, take_rows

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
hf = pytest.importorskip("hsa_compile.model.hf")
pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")

PROMPT = torch.randint(1, 19, (2, 33), generator=torch.Generator().manual_seed(0))  # 6 chunks of 5, and 3 tokens
NEW = 8


def wrapped(variant: str = "hsa-ultralong") -> Any:
    return hf.HSACompileForCausalLM.of(build(small_config(variant)))


def written(model: Any, tokens: Tensor = PROMPT, **changes: Any) -> Any:
    """What `generate` returns, with the logits of each step."""
    options = {"attention_mask": torch.ones_like(tokens), "do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0}
    torch.manual_seed(0)
    return model.generate(tokens, **options | changes, return_dict_in_generate=True, output_logits=True)


def left_padded() -> tuple[Tensor, Tensor]:
    """The two prompts, the first without its first 9 tokens and with padding in their place, and the mask."""
    tokens, mask = PROMPT.clone(), torch.ones_like(PROMPT)
    tokens[0, :9] = mask[0, :9] = 0
    return tokens, mask


def assert_same(a: Any, b: Any) -> None:
    assert torch.equal(a.sequences, b.sequences)
    torch.testing.assert_close(torch.stack(a.logits), torch.stack(b.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", one_first("hsa-ultralong"))
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"do_sample": True, "temperature": 0.8, "top_k": 5},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"prefill_chunk_size": 8},
    ],
    ids=["greedy", "sampling", "beams", "several", "chunked_prefill"],
)
def test_the_cache_changes_neither_tokens_nor_logits(variant: str, how: dict[str, object]) -> None:
    model = wrapped(variant)
    without = written(model, use_cache=False, **{k: v for k, v in how.items() if k != "prefill_chunk_size"})
    with_cache = written(model, **how)
    assert_same(with_cache, without)
    assert isinstance(with_cache.past_key_values, hf.HSACache)
    assert with_cache.past_key_values.get_seq_length() == PROMPT.shape[1] + NEW - 1


@pytest.mark.parametrize("variant", one_first("hsa-ultralong"))
@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"prefill_chunk_size": 4}], ids=["greedy", "beams", "chunked"])
def test_a_text_behind_padding_is_continued_as_alone(variant: str, how: dict[str, object]) -> None:
    model = wrapped(variant)
    tokens, mask = left_padded()
    together = written(model, tokens, attention_mask=mask, **how)
    assert_same(
        together,
        written(model, tokens, attention_mask=mask, use_cache=False, num_beams=how.get("num_beams", 1)),
    )
    alone = written(model, PROMPT[:1, 9:], **how)
    assert torch.equal(together.sequences[0, PROMPT.shape[1] :], alone.sequences[0, PROMPT.shape[1] - 9 :])


def test_the_logits_of_a_piece_are_those_of_the_whole_text() -> None:
    model = wrapped()
    tokens, mask = left_padded()
    whole = model(tokens, attention_mask=mask).logits
    cache = None
    for first, last in ((0, 7), (7, 20), (20, 21), (21, 33)):
        output = model(tokens[:, first:last], attention_mask=mask[:, :last], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        is_text = mask[:, first:last].bool()
        torch.testing.assert_close(output.logits[is_text], whole[:, first:last][is_text], atol=1e-4, rtol=1e-4)
    assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized) == (33, 2, True)
    kept = model(tokens, attention_mask=mask, use_cache=True, logits_to_keep=2).logits
    torch.testing.assert_close(kept, whole[:, -2:], atol=1e-4, rtol=1e-4)


def test_embeddings_are_read_as_tokens_are() -> None:
    model = wrapped()
    embedded = model.get_input_embeddings()(PROMPT)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, model(PROMPT).logits)
    new = model.generate(inputs_embeds=embedded, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(new, written(model, max_new_tokens=5).sequences[:, 33:])
    with pytest.raises(InvalidArgument, match="exactly one of input_ids and inputs_embeds"):
        model(PROMPT, inputs_embeds=embedded)


@pytest.mark.parametrize("variant", one_first("hsa-ultralong"))
def test_a_saved_reading_is_gone_on_with(variant: str, tmp_path: Path) -> None:
    model = wrapped(variant)
    state = new_state(model.model, 2)
    prefill(model.model, PROMPT[:, :21], state, [12, 21])
    save_state(model.model, state, tmp_path)
    cache = hf.HSACache(model.model, load_state(model.model, tmp_path))
    assert cache.get_seq_length() == 21
    tokens, mask = left_padded()
    tokens[0, 9:21] = PROMPT[0, :12]
    output = model(tokens[:, 21:], attention_mask=mask, past_key_values=cache)
    expected = model(tokens, attention_mask=mask).logits[:, 21:]
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prompt_that_was_read_once_is_continued_many_times(variant: str) -> None:
    model = wrapped(variant)
    cache = model(PROMPT[:1, :30], use_cache=True).past_key_values
    first = written(model, PROMPT[:1], past_key_values=copy.deepcopy(cache))
    again = written(model, PROMPT[:1], past_key_values=copy.deepcopy(cache))
    assert_same(first, again)
    assert_same(first, written(model, PROMPT[:1]))
    assert cache.get_seq_length() == 30
    cache.batch_repeat_interleave(3)
    several = model(PROMPT[:1, 30:].expand(3, -1), past_key_values=cache).logits
    torch.testing.assert_close(several, model(PROMPT[:1]).logits[:, 30:].expand(3, -1, -1), atol=1e-4, rtol=1e-4)
    cache.batch_select_indices(torch.tensor([2]))
    assert cache.batch_size == 1
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size) == (0, -1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_that_are_taken_read_on_each_by_itself(variant: str) -> None:
    model = build(small_config(variant))
    state = new_state(model, 2)
    prefill(model, PROMPT, state, [33, 24])
    taken = take_rows(model, state, [1, 0, 1])
    point = snapshot(state)
    more = torch.randint(19, (3, 11), generator=torch.Generator().manual_seed(1))
    logits = extend(model, more, taken)
    texts = [PROMPT[1, :24], PROMPT[0], PROMPT[1, :24]]
    for row, text in enumerate(texts):
        whole = model(torch.cat((text, more[row]))[None])[0, len(text) :]
        torch.testing.assert_close(logits[row], whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(extend(model, more[:2], state)[0], model(torch.cat((PROMPT[0], more[0]))[None])[0, 33:])
    assert point.state.positions is not state.positions
    with pytest.raises(InvalidArgument, match=r"rows = \[2\]"):
        take_rows(model, state, [2])


def test_shared_chunks_outlive_what_another_memory_does_with_its_own() -> None:
    model = build(small_config("hsa-ultralong"))
    state = new_state(model, 1)
    prefill(model, PROMPT[:1], state)
    memory = state.memory
    assert memory is not None
    before = memory.read(0, 0, 5)
    taken = memory.take([0, 0])
    taken.overwrite(0, 4, *(part[:1] + 1 for part in before))
    memory.truncate([3])
    taken.append(*(part[None, :1].expand(2, *part[:1].shape) for part in before))
    for row, first in ((0, 4), (1, 5)):
        for part, kept in zip(taken.read(row, 0, first), before, strict=True):
            assert torch.equal(part, kept[:first])
    assert torch.equal(taken.read(0, 4, 5)[0], before[0][:1] + 1)
    assert taken.num_chunks == [6, 6]
    assert memory.num_chunks == [3]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask has shape \[2, 3\]; \[2, 33\] is needed"),
        ({"attention_mask": torch.tensor([[1] * 10 + [0] * 4 + [1] * 19, [1] * 33])}, "attention_mask has 0 inside"),
        ({"attention_mask": torch.tensor([[1] * 30 + [0] * 3, [1] * 33])}, "attention_mask ends in 0"),
        ({"attention_mask": torch.tensor([[0] * 3 + [1] * 30, [1] * 33])}, r"attention_mask has \[3, 0\] zeros"),
        ({"labels": PROMPT[:, 20:]}, "with a cache of this model does not take labels"),
        ({"output_hidden_states": True}, "with a cache of this model does not take output_hidden_states"),
        ({"input_ids": PROMPT[:1, 20:]}, "input_ids have 1 rows; the cache holds 2 texts"),
    ],
    ids=["shape", "hole", "right", "other_beginning", "labels", "hidden_states", "rows"],
)
def test_what_the_cache_cannot_do_is_refused(change: dict[str, Any], named: str) -> None:
    model = wrapped()
    cache = model(PROMPT[:, :20], use_cache=True).past_key_values
    with pytest.raises(InvalidArgument, match=named):
        model(**{"input_ids": PROMPT[:, 20:], "past_key_values": cache} | change)


def test_caches_that_others_make_and_tokens_taken_back_are_refused() -> None:
    model = wrapped()
    with pytest.raises(InvalidArgument, match="past_key_values is a DynamicCache; this model reads into an HSACache"):
        model(PROMPT, past_key_values=transformers.DynamicCache())
    with pytest.raises(InvalidArgument, match="cache_implementation = 'static'"):
        model.generate(PROMPT, cache_implementation="static", max_new_tokens=2)
    cache = model(PROMPT, use_cache=True).past_key_values
    assert not cache.is_croppable
    with pytest.raises(InvalidArgument, match=r"crop\(1\)"):
        cache.crop(1)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(PROMPT[:1], assistant_model=model, max_new_tokens=2)


def test_generation_works_in_training_mode_and_leaves_it() -> None:
    model = wrapped()
    expected = written(model)
    model.train()
    assert_same(written(model), expected)
    assert model.training
