"""How `model info --devices` prints what training and serving would take."""

from collections.abc import Sequence
from typing import Any

import click

from hsa_compile.cli.options import fitted_table
from hsa_compile.model.scale import Figure, Paper, figures_to_dict
from hsa_compile.model.scale_serving import serving_figures
from hsa_compile.model.scale_training import training_figures

_DECIMAL = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_TIMES = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def scale_to_dict(paper: Paper, batch_tokens: int) -> dict[str, Any]:
    """Both tables, ready for JSON."""
    return {
        "devices": paper.cluster.count,
        "target": paper.cluster.target.to_dict(),
        "mfu_assumed": paper.mfu,
        "training": figures_to_dict(training_figures(paper, batch_tokens)),
        "serving": figures_to_dict(serving_figures(paper)),
    }


def print_scale(paper: Paper, batch_tokens: int) -> None:
    """Both tables, each line with its formula."""
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
