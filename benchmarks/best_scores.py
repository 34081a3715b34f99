"""How often the chunk that an answer is copied from has the best score of all chunks of a training step's rows.

    python benchmarks/best_scores.py [MODEL ...]

A model may read a needle among the best 24 of 200 chunks; among 32,768 its chunk has to be the best. The rows are those
of 20 steps of the last stage of the recipe of `tiny`, drawn with a seed that no run has.
"""

from pathlib import Path

import click
import torch

from hsa_compile.model.layers.hs_attention import Selection
from hsa_compile.model.pretrained import from_pretrained
from hsa_compile.model.training.config_file import resolve
from hsa_compile.model.training.feed import make_batch, mixtures, open_corpus, plan_step
from hsa_compile.paths import CHECKPOINT_DIR

STEPS, SEED = 20, 12345


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
        best, asked = 0, 0
        for batch in batches:
            assert batch.sources is not None
            chosen: list[Selection] = []
            with torch.no_grad():
                model.hidden(batch.tokens[:, :-1], in_batch_memory=True, selections=chosen)
            (rows, length), chunk_size = batch.tokens[:, :-1].shape, model.config.chunk_size
            chunks = batch.sources[:, 1:] // chunk_size
            told = (chunks >= 0) & (chunks < torch.arange(length) // chunk_size)
            right = (rows - 1) * (length // chunk_size) + chunks  # the chunks of the other rows come first
            for selection in chosen:
                first = selection.weights.argmax(-1, keepdim=True)
                picked = selection.indices.gather(-1, first)[..., 0]  # [B, T, H]
                best += int((picked == right[..., None])[told].sum())
                asked += picked[told].numel()
        print(f"{path}: {best:,} of {asked:,} ({best / asked:.1%})")


if __name__ == "__main__":
    main()
