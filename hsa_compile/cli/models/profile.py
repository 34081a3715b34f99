"""`hsa-compile profile`: one step of a model, op by op."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hsa_compile.cli.options import DTYPE_ALIASES, Counts, counted, json_option, print_json
from hsa_compile.errors import InvalidArgument
from hsa_compile.model.config import STEPS, TRAIN, VARIANTS
from hsa_compile.model.presets import PRESETS
from hsa_compile.problem import DTYPES
from hsa_compile.target import Target

if TYPE_CHECKING:
    from hsa_compile.model.cost.profile import StepProfile


@click.command()
@click.option("--model", "name", default="tiny", show_default=True, metavar="PRESET|DIR",
              help="A preset, with random weights, or a saved model.")  # fmt: skip
@click.option("--variant", type=click.Choice(VARIANTS), help="Which variant of the preset.")
@click.option("--step", "kind", type=click.Choice(STEPS), default=TRAIN, show_default=True,
              help="An optimizer step, reading a text, or one decoded token after it.")  # fmt: skip
@click.option(
    "--seq-len", type=Counts(), default="2k", show_default=True, help="How many tokens a row has (16k works)."
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Rows.")
@click.option("--device", default="auto", show_default=True, help="Where to run: auto, cpu, cuda, cuda:1, …")
@click.option(
    "--dtype", type=click.Choice([*DTYPES, *DTYPE_ALIASES]), help="Dtype of the weights; float32 if left out."
)
@click.option("--top", type=click.IntRange(min=1), default=15, show_default=True, help="How many rows the table has.")
@click.option("--trace", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.json[.gz]",
              help="Also write a trace for chrome://tracing or ui.perfetto.dev.")  # fmt: skip
@click.option("--record-picks", "picks", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.safetensors",
              help="Write instead which chunks a trained model picks in source text: tune --inputs FILE.")  # fmt: skip
@json_option
def profile(name: str, variant: str | None, kind: str, seq_len: list[int], batch: int, device: str, dtype: str | None,
            top: int, trace: Path | None, picks: Path | None, as_json: bool) -> None:  # fmt: skip
    """Show where the time of one warmed-up step goes.

    The self time of an op leaves out the ops that it calls; for the ops of hsa_compile, the tuned kernels, it is all
    that they do. On a GPU it is the time of the kernels that the op launched. The shares sum to the whole step. The
    profiler itself costs time, most where ops are short: the line above the table says how much.

    \b
    Examples:
      hsa-compile profile
      hsa-compile profile --model small --step prefill --trace step.json.gz
      hsa-compile profile --model runs/tiny/model --step decode --seq-len 64k
      hsa-compile profile --record-picks picks.safetensors --seq-len 8k
    """
    import tabulate

    from hsa_compile.cli.models.argument import device_of, load_model
    from hsa_compile.model.cost.profile import make_step, profile_step, record_picks

    if len(seq_len) != 1:
        raise InvalidArgument(f"--seq-len names {len(seq_len)} lengths; one is needed")
    place = device_of(device)
    if picks is not None:
        if trace is not None:
            raise InvalidArgument("--trace and --record-picks are two runs; allowed is one at a time")
        model, tokenizer = load_model(name, variant, device=place, dtype=dtype)
        count = record_picks(model, tokenizer, picks, batch=batch, seq_len=seq_len[0])
        click.echo(f"picks of {counted(count, 'retrieval')} on {batch} x {seq_len[0]} tokens in {picks}")
        return
    model, _ = load_model(name, variant, device=place, dtype=dtype, random_seed=0 if name in PRESETS else None)
    step = make_step(kind, model, batch=batch, seq_len=seq_len[0])
    found = profile_step(step, place, trace=trace)
    subject = {
        "model": name,
        "variant": model.config.variant,
        "step": kind,
        "batch": batch,
        "seq_len": seq_len[0],
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        "device": Target.of(place).name,
    }
    if as_json:
        print_json(subject | found.to_dict())
        return
    click.echo(", ".join(f"{key} {value}" for key, value in subject.items()))
    click.echo(f"{found.step_ms:.2f} ms; {found.unprofiled_ms:.2f} ms without the profiler\n")
    click.echo(tabulate.tabulate(list(_rows(found, top)), headers=("op", "self ms", "share", "calls")))
    click.echo(f"\ntuned kernels  {found.tuned_share:.1%} of the step")
    if trace is not None:
        click.echo(f"trace in {trace}")


def _rows(found: StepProfile, top: int) -> Iterator[tuple[Any, ...]]:
    """Yields the longest, and what is left in one row, so that the shares sum to 100 %."""
    shown, rest = found.ops[:top], found.ops[top:]
    for op in shown:
        yield op.name, f"{op.self_ms:.3f}", f"{found.share(op):.1%}", op.calls
    if rest:
        spent = sum(op.self_ms for op in rest)
        yield f"{len(rest)} more", f"{spent:.3f}", f"{spent / found.step_ms:.1%}", sum(op.calls for op in rest)
