"""How often the chunk that a byte of an answer is copied from has the best score of all, in a text of needles.

    python benchmarks/best_scores.py [MODEL ...] [--tokens 1048576]

Every byte of an answer is read from the chunks of the best scores, and the best one counts most. So what `eval` finds
among needles is about the product of these shares over an answer's four bytes. The names that are asked for differ from
all others of the text, which has seven eighths of all names there are, each several times if the text is long.

Names are told apart by the directions in which their queries differ. How many of these a model uses, the effective rank
tells: (Σ λ)² / Σ λ² of the eigenvalues λ of the covariance of the queries for the first bytes.
"""

import random
from pathlib import Path

import click
import torch

from hsa_compile.model.inference.inference import extend, new_state, prefill
from hsa_compile.model.inference.snapshot import rewind, snapshot
from hsa_compile.model.layers.hs_attention import Retrieval, Selection
from hsa_compile.model.pretrained import from_pretrained
from hsa_compile.model.tasks.facts import NAME_BYTES, NEEDLE_BYTES, draw_keys
from hsa_compile.model.tasks.haystack import NeedleHaystack, grid_of
from hsa_compile.paths import CHECKPOINT_DIR

SEED = 5
VALUE_BYTES = 4


@click.command()
@click.argument("models", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--tokens", default=2**20, show_default=True, help="The length of the text.")
@click.option("--samples", default=240, show_default=True, help="How many names are asked for.")
@torch.no_grad()
def main(models: tuple[Path, ...], tokens: int, samples: int) -> None:
    """Each MODEL is a directory that `train` wrote; without any, the shipped `tiny` is asked."""
    rng = random.Random(SEED)
    text = NeedleHaystack().fill(tokens, rng)
    names = draw_keys(rng, samples, text)
    values = [b"%04d" % rng.randrange(10**VALUE_BYTES) for _ in names]
    starts = rng.sample(grid_of(NeedleHaystack(), text)[:-1], samples)  # the text may end within the last needle
    for start, name, value in zip(starts, names, values, strict=True):
        text[start : start + NEEDLE_BYTES] = b" %b=%b." % (name, value)
    chosen: list[Selection] = []
    queries: list[torch.Tensor] = []
    for path in models or (CHECKPOINT_DIR / "tiny",):
        model = from_pretrained(path)
        (retrieval,) = (module for module in model.modules() if isinstance(module, Retrieval))
        retrieval.register_forward_hook(lambda _module, _inputs, selection: chosen.append(selection))
        retrieval.q_proj.register_forward_hook(lambda _module, _inputs, query: queries.append(query))
        state = new_state(model)
        prefill(model, _tokens(text), state)
        end = snapshot(state)
        best = torch.zeros(VALUE_BYTES)
        first_queries: list[torch.Tensor] = []
        for start, name, value in zip(starts, names, values, strict=True):
            rewind(state, end)
            chosen.clear()
            queries.clear()
            extend(model, _tokens(b" ?%b=%b" % (name, value)), state)
            (selection,), (query,) = chosen, queries
            first_queries.append(query[0, -VALUE_BYTES - 1])
            picked = selection.indices.gather(-1, selection.weights.argmax(-1, keepdim=True))[0, -VALUE_BYTES - 1 : -1]
            places = start + 1 + NAME_BYTES + torch.arange(VALUE_BYTES)
            best += picked[:, 0, 0] == places // model.config.chunk_size
        shares = ", ".join(f"{share:.1%}" for share in best / samples)
        print(f"{path}: {shares} of the first to the fourth byte; their product is {(best / samples).prod():.1%}")
        spread = torch.linalg.eigvalsh(torch.stack(first_queries).T.cov())
        print(f"    the effective rank of the queries is {spread.sum().square() / spread.square().sum():.1f}")


def _tokens(text: bytes | bytearray) -> torch.Tensor:
    return torch.tensor([list(text)])


if __name__ == "__main__":
    main()
