"""`hsa-compile generate`: continue a text, which may be as long as a book that was read before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from hsa_compile.cli.options import DTYPE_ALIASES, FiniteFloat, RestrictedOption
from hsa_compile.errors import InvalidArgument
from hsa_compile.log import progress_bar
from hsa_compile.model.config import MAX_SEED, PLACEMENTS, VARIANTS
from hsa_compile.model.presets import PRESETS
from hsa_compile.problem import DTYPES

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hsa_compile.cli.models.argument import Readers
    from hsa_compile.model.data.tokenizer import Tokenizer
    from hsa_compile.model.inference.generate import Sampling, TextStream
    from hsa_compile.model.inference.inference import ModelState
    from hsa_compile.model.transformer import HSATransformer

_PROGRESS_FROM = 4  # from so many pieces on there is a progress bar


@click.command()
@click.option(
    "--model", "name", required=True, metavar="DIR|PRESET", help="The model, saved by train; tiny is shipped trained."
)
@click.option("--random-weights", is_flag=True, help="Draw a preset's weights with --seed; it writes noise.")
@click.option("--variant", type=click.Choice(VARIANTS), help="Which variant of the preset.")
@click.option("--prompt", help="The text to continue.")
@click.option(
    "--prompt-file",
    cls=RestrictedOption,
    excludes=("--prompt",),
    because="one text is continued",
    type=click.File("rb"),
    help="A file that holds the text; - is standard input.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=0),
    default=256,
    show_default=True,
    help="How many tokens to write at most; 0 only reads.",
)
@click.option(
    "--temperature",
    type=FiniteFloat(min=0),
    default=0.0,
    show_default=True,
    help="What logits are divided by; 0 is greedy.",
)
@click.option("--top-p", cls=RestrictedOption, needs="--temperature",
              because="without it the most likely token is taken",
              type=FiniteFloat(0, 1, min_open=True), default=1.0, show_default=True,
              help="Draw only from the most likely tokens that sum to this probability.")  # fmt: skip
@click.option("--stop", multiple=True, help="A text to end before; may be repeated.")
@click.option("--seed", type=click.IntRange(0, MAX_SEED), default=0, show_default=True, help="Seed of what is drawn.")
@click.option("--memory", type=click.Choice(PLACEMENTS), default="device", show_default=True,
              help="Where chunk keys and values lie.")  # fmt: skip
@click.option(
    "--memory-dir",
    cls=RestrictedOption,
    needs="--memory",
    excludes=("--load-memory",),
    because="the file of --memory disk is made there, where nothing was saved before",
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder for the file of --memory disk.",
)
@click.option("--save-memory", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Save what was read there, once the prompt is read.")  # fmt: skip
@click.option("--load-memory", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Go on from what --save-memory saved.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="Where to run: auto, cpu, cuda, cuda:1, …")
@click.option(
    "--dtype", type=click.Choice([*DTYPES, *DTYPE_ALIASES]), help="Dtype of the weights; as saved if left out."
)
def generate(name: str, random_weights: bool, variant: str | None, prompt: str | None, prompt_file: BinaryIO | None,
             max_new_tokens: int, stop: tuple[str, ...], memory: str, memory_dir: Path | None,
             save_memory: Path | None, load_memory: Path | None, device: str, dtype: str | None,
             **sampling: Any) -> None:  # fmt: skip
    """Continue a text with a model; the new text goes to standard output as it comes.

    The prompt is read by the exact fast prefill, in time linear in its length. The new text ends at a stop text, at
    the tokenizer's end of a document, or after --max-new-tokens. A book can be read once and asked many times:

    \b
      hsa-compile generate --model DIR --prompt-file book.txt \\
          --max-new-tokens 0 --save-memory book
      hsa-compile generate --model DIR --load-memory book --prompt 'Who was it?'

    Under torchrun the processes read the text together, and each keeps a share of its memory; the first one writes.

    \b
    Examples:
      hsa-compile generate --model DIR --prompt 'def main(' --temperature 0.8
      cat notes.txt | hsa-compile generate --model DIR --prompt-file -
      hsa-compile generate --model DIR --prompt-file notes.txt \\
          --memory disk --memory-dir /tmp/memory
      hsa-compile generate --model tiny --max-new-tokens 5 \\
          --prompt 'Here we go. abc=1234. The sky is blue. ?abc='
      hsa-compile generate --model small --random-weights --prompt hello
      torchrun --nproc-per-node 4 -m hsa_compile generate --model DIR \\
          --prompt-file book.txt
    """
    from hsa_compile.cli.models.argument import joined_readers, keep_freed_memory, load_model
    from hsa_compile.model.inference.generate import Sampling, TextStream
    from hsa_compile.model.inference.inference import new_state
    from hsa_compile.model.inference.reading import load_state

    drawn = Sampling(**sampling)
    if (prompt is None) == (prompt_file is None):
        raise InvalidArgument("one of --prompt and --prompt-file is needed")
    if random_weights and name not in PRESETS:
        raise InvalidArgument(f"--random-weights is for presets; {name} is a saved model with weights of its own")
    if memory != "disk" and memory_dir is not None:
        raise InvalidArgument(f"--memory-dir is for --memory disk, not {memory}")
    if memory == "disk" and memory_dir is None and load_memory is None:
        raise InvalidArgument("--memory disk needs --memory-dir DIR for its file")
    with joined_readers(device) as readers:
        keep_freed_memory(readers.device)
        saved = [flag for flag, place in (("--save-memory", save_memory), ("--load-memory", load_memory)) if place]
        if saved and readers.mesh is not None:
            raise InvalidArgument(f"{saved[0]} is for one process, and torchrun started several")
        raw = (prompt or "").encode(errors="surrogateescape")
        if prompt_file is not None:  # several processes have one standard input
            raw = readers.from_first(prompt_file.read() if readers.is_first else None)
        model, tokenizer = load_model(name, variant, device=readers.device, dtype=dtype,
                                      random_seed=drawn.seed if random_weights else None)  # fmt: skip
        tokens = _encode(tokenizer, raw)
        if load_memory is not None:
            state = load_state(model, load_memory, memory=memory)
            if len(state.positions) != 1 or (state.rows is not None and len(state.rows) != 1):
                raise InvalidArgument(f"{load_memory} holds several texts; generate continues one")
        else:
            state = new_state(model, memory=memory, directory=memory_dir, mesh=readers.mesh)
        texts = TextStream(tokenizer, stop)
        _write(model, tokens, state, texts, tokenizer.separator, max_new_tokens, drawn, save_memory, readers)


def _write(
    model: HSATransformer,
    tokens: Tensor,
    state: ModelState,
    texts: TextStream,
    separator: int | None,
    max_new_tokens: int,
    sampling: Sampling,
    save_memory: Path | None,
    readers: Readers,
) -> None:
    from hsa_compile.model.inference.generate import stream
    from hsa_compile.model.inference.reading import save_state

    steps = stream(model, tokens, max_new_tokens=max_new_tokens, sampling=sampling, state=state)
    with _progress(model, len(tokens), readers):
        step = next(steps, None)  # this reads the prompt, and nothing more
    if save_memory is not None:
        save_state(model, state, save_memory)
        click.echo(f"read {state.positions[0]:,} tokens in all; kept in {save_memory}", err=True)
    while step is not None and step[0] is not None and step[0] != separator:
        _show(texts.feed(step[0]), readers)
        step = None if texts.stopped else next(steps, None)
    _show(texts.finish() + ("\n" if max_new_tokens else ""), readers)


def _show(text: str, readers: Readers) -> None:
    if text and readers.is_first:
        click.echo(text.encode(errors="replace"), nl=False)  # UTF-8, whatever the terminal's locale says


def _encode(tokenizer: Tokenizer, raw: bytes) -> Tensor:
    import numpy as np
    import torch

    try:
        tokens = tokenizer.encode_batch([raw])[0]
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"the prompt is no UTF-8 text ({error}); tokenizer {tokenizer.name} needs it") from error
    if len(tokens) == 0:
        raise InvalidArgument("the prompt is empty; at least one token is needed")
    # Bytes stay bytes, so that a book of 16M tokens need not be eight times as large.
    return torch.from_numpy(tokens.astype(np.uint8 if tokens.dtype == np.uint8 else np.int64))


@contextlib.contextmanager
def _progress(model: HSATransformer, num_tokens: int, readers: Readers) -> Iterator[None]:
    """Shows a bar on standard error while a long prompt, or this process's part of it, runs through the first layer."""
    from hsa_compile.model.inference.inference import PIECE

    first = next(iter([*model.lower, *model.upper]))
    num_tokens //= 1 if readers.mesh is None else readers.mesh.size()
    is_hidden = num_tokens < _PROGRESS_FROM * PIECE or not readers.is_first
    with progress_bar(num_tokens, "read", hidden=is_hidden, unit="tok", unit_scale=True) as bar:

        def count(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            # A model may put tokens of its own into the text.
            bar.update(min(inputs[0].shape[1], num_tokens - int(bar.n)))

        hook = first.register_forward_pre_hook(count)
        try:
            yield
        finally:
            hook.remove()
