"""Chunks that travel: how many are expected, which way sends less, and where their gradients go."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from small_models import small_config

from hsa_compile.model.layers.exchange import SharedRows, _Copies
from hsa_compile.model.layers.hs_attention import EncodedChunks, Selection, SequenceMemory
from hsa_compile.model.layers.picked_chunks import ChunkTraffic, _few_lengths

TRAFFIC = ChunkTraffic(parts=4, rows=3, chunks=40, picks=60, retrievals=1)


@pytest.mark.parametrize("in_batch", [False, True])
def test_as_many_chunks_are_expected_as_random_picks_hit(in_batch: bool) -> None:
    traffic, generator, rounds = replace(TRAFFIC, in_batch=in_batch), np.random.default_rng(0), 200
    fetched, kept = 0, 0
    for part in [*range(4)] * rounds:
        if in_batch:
            picks = {divmod(int(pick), 40) for pick in generator.integers(3 * 40, size=3 * 60)}
        else:
            picks = {(row, int(pick)) for row in range(3) for pick in generator.integers(10 * (part + 1), size=60)}
        fetched += sum(chunk // 10 != part for _, chunk in picks)
        kept += len(picks) if part == 3 else 0
    assert traffic.fetched == pytest.approx(fetched / 4 / rounds, rel=0.02)
    assert traffic.kept == pytest.approx(kept / rounds, rel=0.02)


def test_the_way_that_brings_less_is_favoured() -> None:
    assert TRAFFIC.gathered == 2 * 3 * 30  # chunks and gradients
    assert TRAFFIC.travels("auto")  # later chunks are never asked for
    assert not replace(TRAFFIC, retrievals=3).travels("auto")  # each retrieval asks anew
    assert replace(TRAFFIC, retrievals=3, picks=5).travels("auto")
    assert not replace(TRAFFIC, retrievals=2, picks=60, forwards=2).travels("auto")


def test_a_config_says_how_often_tokens_pick() -> None:
    traffic = ChunkTraffic.of(small_config("hsa-ultralong", top_k=3), parts=4, rows=2, places=103, forwards=2)
    assert traffic == ChunkTraffic(parts=4, rows=2, chunks=17, picks=75, retrievals=2, forwards=2)
    assert ChunkTraffic.of(small_config("drt", top_k=3), parts=4, rows=2, places=103, forwards=2).picks == 12
    assert not traffic.travels("auto")
    assert [traffic.travels(way) for way in ("gather", "travel")] == [False, True]


@pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")
@pytest.mark.parametrize("in_batch", [False, True])
def test_fetched_chunks_are_read_as_those_that_are_here(in_batch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four processes, the third has no chunk; what they hold together stands in for what they would send."""
    torch.manual_seed(0)
    bounds, batch = (0, 2, 5, 5, 8), 3
    k, v, landmarks = (torch.randn(batch, 8, *shape) for shape in ((5, 2, 8), (5, 2, 6), (2, 2, 10)))
    here = SequenceMemory(EncodedChunks(k=k, v=v, landmarks=landmarks), in_batch=in_batch)
    owners = SharedRows(mesh=None, bounds=bounds)  # type: ignore[arg-type]
    own = EncodedChunks(k=k[:, 2:5], v=v[:, 2:5], landmarks=landmarks)
    elsewhere = SequenceMemory(own, in_batch=in_batch, owners=owners)

    both = torch.cat((k, v), dim=-1).movedim(3, 2)
    table = torch.cat([both[:, first:last].flatten(0, 2) for first, last in pairwise(bounds)])
    monkeypatch.setattr(SharedRows, "fetch", lambda self, own, wanted: table[wanted])
    indices, weights = here.select(torch.randn(batch, 43, 2, 10), [0], top_k=3, fusion="softmax", once_a_chunk=False)
    chosen = elsewhere.fetch(Selection(indices=indices, weights=weights)).fetched
    assert chosen is not None
    q, options = torch.randn(batch, 43, 4, 8), {"softmax_off_by_one": True, "mask_last_token": True}
    found = chosen.attend(q, chosen.indices, weights, **options)
    torch.testing.assert_close(found, here.attend(q, indices, weights, **options))
    assert here.fetch(Selection(indices=indices, weights=weights)).fetched is None


def test_gradients_of_copies_add_up_at_their_owner() -> None:
    table = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    places = torch.tensor([0, 2, 4, 2, 0, 1])  # three processes ask, the second for nothing
    copies = _Copies.apply(table, places, [3, 0, 3])
    assert torch.equal(copies, table[places])
    torch.autograd.gradcheck(lambda rows: _Copies.apply(rows, places, [3, 0, 3]), table)


def test_lengths_are_few_and_little_longer() -> None:
    found = [_few_lengths(count) for count in range(1, 5000)]
    assert all(count <= length <= count * 9 / 8 + 1 for count, length in enumerate(found, 1))
    assert len(set(found)) < 100
    assert _few_lengths(0) == 1
