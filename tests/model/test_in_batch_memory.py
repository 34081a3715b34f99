"""Sequences of a batch that see each other's chunks."""

from dataclasses import replace

import pytest
import torch
from small_models import build, small_config

from hsa_compile.model.layers.hs_attention import EncodedChunks, SequenceMemory

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")


def chunks(batch: int, num_chunks: int) -> EncodedChunks:
    """Two heads, chunks of 5 tokens."""
    torch.manual_seed(0)
    return EncodedChunks(
        k=torch.randn(batch, num_chunks, 5, 2, 8),
        v=torch.randn(batch, num_chunks, 5, 2, 8),
        landmarks=torch.randn(batch, num_chunks, 2, 10),
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
