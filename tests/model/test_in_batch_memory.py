"""Sequences of a batch that see each other's chunks."""

import itertools
from dataclasses import replace

import pytest
import torch
from small_models import build, small_config

from hsa_compile.model.layers.hs_attention import EncodedChunks, SequenceMemory

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")


def chunks(batch: int, num_chunks: int) -> EncodedChunks:
    """Two heads, chunks of 5 tokens, two landmarks each."""
    torch.manual_seed(0)
    return EncodedChunks(
        k=torch.randn(batch, num_chunks, 5, 2, 8),
        v=torch.randn(batch, num_chunks, 5, 2, 8),
        landmarks=torch.randn(batch, num_chunks, 2, 2, 10),
    )


@pytest.mark.parametrize("once_a_chunk", [False, True])
def test_the_chunks_of_others_stand_before_the_own(once_a_chunk: bool) -> None:
    """Each sequence as one that went on behind all others: the same picks, weights and outputs."""
    found, num_queries = chunks(3, 4), 4 if once_a_chunk else 23
    query, q = torch.randn(3, num_queries, 2, 10), torch.randn(3, num_queries, 4, 8)
    shared = SequenceMemory(found, in_batch=True)
    options = {"top_k": 6, "fusion": "softmax", "once_a_chunk": once_a_chunk}
    indices, weights = shared.select(query, [0], **options)  # type: ignore[arg-type]
    o = shared.attend(q, indices, weights, softmax_off_by_one=False, mask_last_token=False)
    assert (indices[:, 0] >= 0).all()  # before the first chunk of its own is complete
    for row in range(3):
        order = [(row + 1) % 3, (row + 2) % 3, row]
        joined = EncodedChunks(
            **{name: getattr(found, name)[order].flatten(0, 1)[None] for name in ("k", "v", "landmarks")}
        )
        alone = SequenceMemory(joined)
        past = 8 if once_a_chunk else 40
        longer = torch.cat((torch.randn(1, past, 2, 10), query[row : row + 1]), dim=1)
        picks, shares = (x[:, past:] for x in alone.select(longer, [0], **options))  # type: ignore[arg-type]
        assert torch.equal(indices[row], picks[0])
        torch.testing.assert_close(weights[row], shares[0])
        expected = alone.attend(q[row : row + 1], picks, shares, softmax_off_by_one=False, mask_last_token=False)
        torch.testing.assert_close(o[row], expected[0])


def test_one_sequence_has_nobody_to_share_with() -> None:
    found = chunks(1, 4)
    assert SequenceMemory(found, in_batch=True).landmarks is found.landmarks


@pytest.mark.parametrize("variant", ["hsa-ultralong", "ramba", "drt"])
def test_texts_reach_each_other_only_if_they_share(variant: str) -> None:
    model = build(replace(small_config(variant), top_k=12))
    tokens = torch.randint(19, (2, 37))
    other = tokens.clone()
    other[1] = (other[1] + 1) % 19
    with torch.no_grad():
        for in_batch in (False, True):
            before, after = (model.hidden(texts, in_batch_memory=in_batch)[0] for texts in (tokens, other))
            assert torch.equal(before, after) != in_batch


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("position", [0, 10])
def test_a_query_is_told_the_chunk_of_its_source_among_those_of_all_rows(in_batch: bool, position: int) -> None:
    found, query = chunks(3, 4), torch.randn(3, 10, 2, 10)
    found.landmarks.requires_grad_()
    sources = torch.tensor([[-1, 0, 4, 5, 9, 10, 14, 15, 19, 3]] * 3)
    losses = SequenceMemory(found, in_batch=in_batch).source_losses(query, sources, position)
    for row, token in itertools.product(range(3), range(10)):
        source, complete = int(sources[row, token]), (position + token) // 5
        if not 0 <= source < 5 * complete:
            assert losses[row, token] == 0
            continue
        rivals = [(b, n) for b in range(3) for n in range(4) if b != row or n < complete]
        scores = torch.stack([(found.landmarks[at] * query[row, token]).sum(-1).amax(0) for at in rivals])
        expected = -scores.log_softmax(0)[rivals.index((row, source // 5))].mean()
        torch.testing.assert_close(losses[row, token], expected)
    losses.sum().backward()
    assert found.landmarks.grad is not None
    assert found.landmarks.grad.any(dim=2).all()  # of each chunk, one landmark or both


@pytest.mark.parametrize("length", [3, 5])
def test_without_a_complete_chunk_no_query_is_told_anything(length: int) -> None:
    query = torch.randn(2, length, 2, 10)
    memory = SequenceMemory(chunks(2, length // 5), in_batch=True)
    assert memory.source_losses(query, torch.zeros(2, length, dtype=torch.int64), 0).tolist() == [[0.0] * length] * 2
