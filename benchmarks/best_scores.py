"""How often the chunk that an answer is copied from has the best score of all chunks of a training step's rows.

    python benchmarks/best_scores.py [MODEL ...]

A model may read a needle among the best 24 of 200 chunks; among 32,768 its chunk has to be the best. The rows are those
of 20 steps of the last stage of the recipe of `tiny`, drawn with a seed that no run has. The share is printed for all
bytes of answers, and for the first byte of a name's only value by how many names stand in the chunk: its landmarks have
to tell of all of them.
"""

import re
from collections import Counter
from pathlib import Path

import click
import torch

from hsa_compile.model.layers.hs_attention import Selection
from hsa_compile.model.pretrained import from_pretrained
from hsa_compile.model.training.config_file import resolve
from hsa_compile.model.training.feed import StepBatch, make_batch, mixtures, open_corpus, plan_step
from hsa_compile.model.transformer import HSATransformer
from hsa_compile.paths import CHECKPOINT_DIR

STEPS, SEED = 20, 12345
_NAME = re.compile(rb"[a-z]{3}=")
ALL = -1


@click.command()
@click.argument("models", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(models: tuple[Path, ...]) -> None:
    """Each MODEL is a directory that `train` wrote; without any, the shipped `tiny` is asked."""
    recipe = resolve(preset_name="tiny")
    by_stage = mixtures(recipe, open_corpus(recipe))
    plans = [plan_step(recipe, recipe.train.steps - 1 - number) for number in range(STEPS)]
    batches = [make_batch(by_stage[plan.stage], plan, seed=SEED) for plan in plans]
    for path in models or (CHECKPOINT_DIR / "tiny",):
        model = from_pretrained(path)
        best, asked = Counter[int](), Counter[int]()
        for batch in batches:
            _count(model, batch, best, asked)
        for names in sorted(asked):
            what = "all bytes" if names == ALL else f"first bytes, {names} names in the chunk"
            print(f"{path}, {what}: {best[names]:,} of {asked[names]:,} ({best[names] / asked[names]:.1%})")


def _count(model: HSATransformer, batch: StepBatch, best: Counter[int], asked: Counter[int]) -> None:
    """Counts the bytes of answers, and those whose chunk has the best score, by the names in that chunk."""
    assert batch.sources is not None
    chosen: list[Selection] = []
    with torch.no_grad():
        model.hidden(batch.tokens[:, :-1], in_batch_memory=True, selections=chosen)
    (rows, length), chunk_size = batch.tokens[:, :-1].shape, model.config.chunk_size
    chunks = batch.sources[:, 1:] // chunk_size
    told = (chunks >= 0) & (chunks < torch.arange(length) // chunk_size)
    is_first = batch.tokens[:, :-1] == ord("=")
    right = (rows - 1) * (length // chunk_size) + chunks  # the chunks of the other rows come first
    texts = [bytes(row.tolist()) for row in batch.tokens]
    for selection in chosen:
        best_slot = selection.weights.argmax(-1, keepdim=True)
        picked = selection.indices.gather(-1, best_slot)[..., 0]  # [B, T, H]
        hits = (picked == right[..., None])[told].flatten().tolist()
        best[ALL] += sum(hits)
        asked[ALL] += len(hits)
        places = [place for place in told.nonzero().tolist() for _ in range(picked.shape[2])]
        for (row, token), is_best in zip(places, hits, strict=True):
            name = texts[row][token - 3 : token + 1]
            if is_first[row, token] and texts[row].count(b" " + name) == 1:
                start = int(chunks[row, token]) * chunk_size
                names = len(_NAME.findall(texts[row], start, start + chunk_size))
                best[names] += is_best
                asked[names] += 1


if __name__ == "__main__":
    main()
