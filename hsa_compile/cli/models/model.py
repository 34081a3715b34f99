"""`hsa-compile model info`: what a model costs, before it exists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from hsa_compile.cli.options import DTYPE_ALIASES, Counts, RestrictedOption, fitted_table, json_option, print_json
from hsa_compile.errors import InvalidArgument
from hsa_compile.model.config import DEFAULT_MFU, VARIANTS
from hsa_compile.problem import DTYPES

if TYPE_CHECKING:
    from hsa_compile.model.cost.info import LayerInfo, ModelInfo
    from hsa_compile.model.cost.scale import Figure, Paper
    from hsa_compile.model.cost.scaling import ScalingRow


_DECIMAL = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_TIMES = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def scale_to_dict(paper: Paper, batch_tokens: int) -> dict[str, Any]:
    """Returns the tables of training and serving, ready for JSON."""
    from hsa_compile.model.cost.phases import serving_figures, training_figures
    from hsa_compile.model.cost.scale import figures_to_dict

    return {
        "devices": paper.cluster.count,
        "target": paper.cluster.target.to_dict(),
        "mfu_assumed": paper.mfu,
        "training": figures_to_dict(training_figures(paper, batch_tokens)),
        "serving": figures_to_dict(serving_figures(paper)),
    }


def print_scale(paper: Paper, batch_tokens: int) -> None:
    """Prints the tables of training and serving, each line with its formula."""
    from hsa_compile.model.cost.phases import serving_figures, training_figures

    cluster, limits = paper.cluster, paper.limits
    click.echo(
        f"\n{cluster.count} x {cluster.target.name}: {limits.tflops:g} TFLOP/s dense bf16, {limits.memory_gb:g} GB, "
        f"{limits.memory_gb_s:g} GB/s; {limits.scale_up_gb_s:g} GB/s in a node, {limits.host_gb_s:g} GB/s PCIe"
    )
    click.echo(
        f"bound: at these peaks; MFU {paper.mfu:g}: matrix products at {paper.mfu:g} of theirs, an ASSUMPTION "
        "(--mfu). Nothing here was measured."
    )
    for title, figures in (("training", training_figures(paper, batch_tokens)), ("serving", serving_figures(paper))):
        click.echo()
        click.echo(_table(title, figures, f"MFU {paper.mfu:g}"))


def print_scaling(tables: Mapping[str, Sequence[ScalingRow]]) -> None:
    """Prints the tables of strong and weak scaling."""
    headers = ("devices", "tokens a step", "devices a row", "memory a device", "a step", "slowest", "tokens a day",
               "efficiency")  # fmt: skip
    for name, rows in tables.items():
        cells = [
            (
                row.devices,
                f"{_shown(row.tokens, 'tokens')}",
                row.context_parallel,
                _shown(row.memory, "B") + ("" if row.fits else " (too much)"),
                _shown(row.seconds, "s"),
                row.slowest,
                _shown(row.tokens_a_day, "tokens"),
                f"{row.efficiency:.2f}",
            )
            for row in rows
        ]
        click.echo(f"\n{name} scaling, on paper; nothing here was measured")
        click.echo(fitted_table(cells, headers, numbers=False))


def _table(title: str, figures: Sequence[Figure], assumed: str) -> str:
    rows = [
        (
            figure.name,
            _shown(figure.value, figure.unit) + (f" ({figure.bound[0]})" if figure.bound else ""),
            "" if figure.assumed is None
            else _shown(figure.assumed, figure.unit) + (f" ({figure.bound[1]})" if figure.bound else ""),
            figure.formula,
        )
        for figure in figures
        if figure.value or figure.unit not in ("B", "s")  # a model without a memory spends nothing on one
    ]  # fmt: skip
    return fitted_table(rows, (title, "bound", assumed, "formula"), numbers=False)


def _shown(value: float, unit: str) -> str:
    if unit == "s":
        factor, name = next(((f, n) for f, n in _TIMES if value >= f), _TIMES[-1])
        return f"{value / factor:.3g} {name}"
    if unit in ("", "texts"):
        return f"{value:,.0f}"
    if unit == "days":
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    factor, prefix = next(((f, n) for f, n in _DECIMAL if value >= f), (1.0, ""))
    return f"{value / factor:.3g} {prefix}{'B' if unit == 'B' else ''}".rstrip()


_UNITS = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
_COUNTS = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))


@click.group()
def model() -> None:
    """Show what a bundled or saved language model costs."""


@model.command(short_help="Show layers, parameters, memory and FLOPs; with --devices, scale.")
@click.argument("name", metavar="PRESET|DIR")
@click.option("--variant", type=click.Choice(VARIANTS), help="Which variant of the preset; hsa-ultralong if left out.")
@click.option(
    "--context", type=Counts(), default="8k", show_default=True, help="How many tokens of text it reads (16m works)."
)
@click.option(
    "--dtype",
    type=click.Choice([*DTYPES, *DTYPE_ALIASES]),
    default="bf16",
    show_default=True,
    help="Dtype of weights, caches and memory.",
)
@click.option(
    "--devices",
    metavar="[N[-M]x]DEVICE",
    help="Also show training and serving on such devices, on paper: 64xh100. 8-4096xh100 shows how training scales.",
)
@click.option(
    "--mfu",
    cls=RestrictedOption,
    needs="--devices",
    because="it is assumed of them",
    type=float,
    default=DEFAULT_MFU,
    show_default=True,
    help="Share of the devices' peak that is assumed.",
)
@click.option(
    "--batch-tokens",
    cls=RestrictedOption,
    needs="--devices",
    because="they take the step",
    type=Counts(),
    default="4m",
    show_default=True,
    help="How many tokens a training step takes.",
)
@json_option
def info(
    name: str, variant: str | None, context: list[int], dtype: str, devices: str | None, mfu: float,
    batch_tokens: list[int], as_json: bool,
) -> None:  # fmt: skip
    """Show layers, parameters, memory at a context length and FLOPs of a model; no weight is allocated.

    PRESET is tiny, small, 345m, 0.5b or 8b-a1b; DIR is what a training run or save_pretrained wrote. FLOPs are
    those of products, for a token of text, on average over the context; training counts three times the forward pass.

    With --devices it also shows what training and serving at that context would take on so many a100, h100, h200, b200
    or mi300x, in bfloat16: bounds from the device table that the tuner predicts by, the same at an assumed share of the
    peak, and the formula of each. With two numbers of devices it shows a training step on the first, twice as many, and
    so on, at the assumed share. In strong scaling all together take --batch-tokens; in weak scaling each device takes
    equally many tokens.

    \b
    Examples:
      hsa-compile model info tiny
      hsa-compile model info 0.5b --variant full --context 32k
      hsa-compile model info 8b-a1b --context 16m --json
      hsa-compile model info 8b-a1b --context 16m --devices 64xh100
      hsa-compile model info 8b-a1b --batch-tokens 16m --devices 8-4096xh100
    """
    import tabulate
    import torch

    from hsa_compile.cli.models.argument import config_of
    from hsa_compile.model.cost.info import model_info
    from hsa_compile.model.cost.scale import Paper
    from hsa_compile.model.cost.scaling import parse_clusters, scaling

    for flag, values in (("--context", context), ("--batch-tokens", batch_tokens)):
        if len(values) != 1:
            raise InvalidArgument(f"{flag} names {len(values)} numbers; one is needed")
    config = config_of(name, variant)
    paper = scaled = None
    if devices is not None:
        clusters, bf16 = parse_clusters(devices), model_info(config, context=context[0])
        if len(clusters) == 1:
            paper = Paper(info=bf16, cluster=clusters[0], mfu=mfu)
        else:
            scaled = scaling(bf16, clusters, mfu, batch_tokens[0])
    counted = model_info(config, context=context[0], dtype=getattr(torch, DTYPE_ALIASES.get(dtype, dtype)))
    if as_json:
        scale = {"scale": scale_to_dict(paper, batch_tokens[0])} if paper else {}
        steps = {name: [asdict(row) for row in rows] for name, rows in (scaled or {}).items()}
        print_json({**counted.to_dict(), **scale, **({"scaling": steps} if scaled else {})})
        return
    click.echo(tabulate.tabulate(list(_layer_rows(counted)), headers=("layers", "holds", "parameters", "active")))
    click.echo()
    totals = list(_totals(counted, dtype))
    width = max(len(what) for what, _ in totals)
    for what, value in totals:
        click.echo(f"{what:{width}}  {value}")
    if paper:
        print_scale(paper, batch_tokens[0])
    if scaled:
        print_scaling(scaled)


def _layer_rows(counted: ModelInfo) -> Iterator[tuple[Any, ...]]:
    """Yields a row for all layers that are alike and follow each other; sizes are those of one of them."""
    config = counted.config
    groups: list[list[LayerInfo]] = []
    for layer in counted.layers:
        if groups and _kind(groups[-1][0]) == _kind(layer):
            groups[-1].append(layer)
        else:
            groups.append([layer])
    encoder = f"{counted.encoder_parameters:,}"
    for group in groups:
        first, last = group[0], group[-1]
        if first.index == config.num_lower_layers and config.has_memory:
            yield "", f"chunk encoder, chunks of {config.chunk_size}", encoder, encoder
        names = str(first.index) if first is last else f"{first.index} … {last.index}"
        yield f"{names} {first.half}", _holds(first), f"{first.parameters:,}", f"{first.active_parameters:,}"


def _kind(layer: LayerInfo) -> tuple[Any, ...]:
    return layer.half, layer.mixer, layer.retrieves, layer.reads_memory, layer.mlp


def _holds(layer: LayerInfo) -> str:
    parts = [layer.mixer if layer.mixer != "none" else ""]
    parts += ["retrieval"] * layer.retrieves + ["chunk attention"] * layer.reads_memory
    parts.append(f"{layer.mlp} MLP" if layer.mlp == "dense" else "MoE" if layer.mlp == "moe" else "")
    return " + ".join(part for part in parts if part)


def _totals(counted: ModelInfo, dtype: str) -> Iterator[tuple[str, str]]:
    config, memory = counted.config, counted.memory
    yield "variant", config.variant
    yield "parameters", f"{counted.parameters:,}"
    yield "  embeddings", f"{counted.embedding_parameters:,}{' (tied)' if config.tie_embeddings else ''}"
    yield "  active", f"{counted.active_parameters:,} without embeddings"
    yield f"memory at {counted.context:,} tokens, {dtype}", _scaled(memory.total, _UNITS, "B")
    yield "  weights", _scaled(memory.weights, _UNITS, "B")
    yield "  caches of the layers", _scaled(memory.caches, _UNITS, "B")
    if config.has_memory:
        yield "  chunk keys", _scaled(memory.chunk_keys, _UNITS, "B")
        yield "  chunk values", _scaled(memory.chunk_values, _UNITS, "B")
        yield "  landmarks", _scaled(memory.landmarks, _UNITS, "B")
    yield "FLOPs a token, forward", _scaled(counted.forward_flops, _COUNTS)
    for part, flops in counted.flops.items():
        if flops:
            yield f"  {part}", _scaled(flops, _COUNTS)
    yield "FLOPs a token, training", _scaled(counted.training_flops, _COUNTS)
    yield "FLOPs a token, prefill", _scaled(counted.prefill_flops, _COUNTS)


def _scaled(number: float, units: tuple[tuple[int, str], ...], smallest: str = "") -> str:
    for factor, unit in units:
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number:.0f} {smallest}".rstrip()
