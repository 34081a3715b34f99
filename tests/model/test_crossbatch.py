"""In training a row may choose among the chunks of other rows too, as if it came after their texts."""

import pytest
import torch
from small_models import build, small_config

from hsa_compile.model.chunk_encoder import EncodedChunks
from hsa_compile.model.hs_attention import Selection, SequenceMemory

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")

VARIANTS = ["hsa-ultralong", "drt", "ramba"]
B, T = 3, 43


def encoded(num_chunks: int = 4, chunk_size: int = 5, dim: int = 6, retrieval_dim: int = 7) -> EncodedChunks:
    """Chunks of `B` rows in float64."""
    torch.manual_seed(3)
    k, v = (torch.randn(B, num_chunks, chunk_size, 2, dim, dtype=torch.float64) for _ in range(2))
    return EncodedChunks(k=k, v=v, landmarks=torch.randn(B, num_chunks, 2, retrieval_dim, dtype=torch.float64))


@pytest.mark.parametrize("crossbatch", [1, 2, 9])
def test_a_row_reads_what_it_would_after_the_texts_of_the_others(crossbatch: int) -> None:
    chunks = encoded()
    num_others = min(crossbatch, B - 1)
    together = SequenceMemory(chunks, crossbatch=crossbatch)
    length = 4 * 5 + 3
    query, q = torch.randn(B, length, 2, 7, dtype=torch.float64), torch.randn(B, length, 4, 6, dtype=torch.float64)
    indices, weights = together.select(query, [0] * B, top_k=3, fusion="softmax", once_a_chunk=False)
    read = together.attend(q, indices, weights, softmax_off_by_one=False, mask_last_token=False)
    for row in range(B):
        before = [(row - shift) % B for shift in range(num_others, 0, -1)]
        landmarks = torch.cat([chunks.landmarks[i] for i in (*before, row)])
        k, v = (torch.cat([x[i] for i in (*before, row)]) for x in (chunks.k, chunks.v))
        for t in range(0, length, 4):
            for head in range(2):
                visible = len(before) * 4 + t // 5
                scores = landmarks[:visible, head] @ query[row, t, head] / 7**0.5
                best = scores.topk(3)
                assert set(indices[row, t, head].tolist()) == set(best.indices.tolist())
                fused = torch.zeros(2, 6, dtype=torch.float64)
                for index, weight in zip(best.indices, best.values.softmax(0), strict=True):
                    logits = q[row, t, 2 * head : 2 * head + 2] @ k[index, :, head].T / 6**0.5
                    fused += weight * logits.softmax(-1) @ v[index, :, head]
                torch.testing.assert_close(read[row, t, 2 * head : 2 * head + 2], fused, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_training_mixes_rows(variant: str) -> None:
    model = build(small_config(variant, selection_noise=False))
    torch.manual_seed(0)
    tokens = torch.randint(19, (B, T))
    other = tokens.clone()
    other[1] = torch.randint(19, (T,))
    alone = model(tokens)
    model.crossbatch = 2
    torch.testing.assert_close(model(tokens), alone, rtol=0, atol=0)
    model.train()
    chosen: list[Selection] = []
    mixed = model(tokens, selections=chosen)
    own = T if variant != "drt" else T + T // 4
    assert all(int(selection.indices.max()) >= own // 5 for selection in chosen)
    assert not torch.equal(mixed[0], alone[0])
    assert not torch.equal(model(other)[0], mixed[0])
    model.crossbatch = 0
    torch.testing.assert_close(model(tokens), alone, rtol=0, atol=0)


def test_gradients_reach_the_chunks_of_other_rows() -> None:
    chunks = encoded()
    leaves = [chunks.k.requires_grad_(), chunks.v.requires_grad_(), chunks.landmarks.requires_grad_()]
    memory = SequenceMemory(chunks, crossbatch=2)
    torch.manual_seed(1)
    query, q = torch.randn(B, 4, 2, 7, dtype=torch.float64), torch.randn(B, 4, 4, 6, dtype=torch.float64)
    indices, weights = memory.select(query, [0] * B, top_k=3, fusion="softmax", once_a_chunk=False)
    read = memory.attend(q, indices, weights, softmax_off_by_one=False, mask_last_token=False)
    read[0].square().sum().backward()  # four tokens have no chunk of their own row yet
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad[0].abs().max() == 0
        assert leaf.grad[1:].abs().max() > 0
