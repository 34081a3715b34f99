"""How a training step scales with the number of devices, on paper: the same step on more of them, or larger steps."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.cost.info import ModelInfo
from hsa_compile.model.cost.phases import fits, split_rows, training_figures
from hsa_compile.model.cost.scale import Cluster, Paper


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingRow:
    """A training step on one number of devices.

    Attributes:
        devices: how many there are.
        tokens: how many tokens a step takes.
        context_parallel: how many devices share a row.
        memory: bytes that a device holds.
        fits: whether it has that much.
        seconds: the time of a step, where matrix products reach the assumed share of their peak.
        slowest: what takes that long: compute, links in a node, or the network.
        tokens_a_day: how many tokens all devices train on in a day.
        efficiency: tokens a day and device, over those of the first row.
    """

    devices: int
    tokens: int
    context_parallel: int
    memory: float
    fits: bool
    seconds: float
    slowest: str
    tokens_a_day: float
    efficiency: float = 1.0


def parse_clusters(text: str) -> list[Cluster]:
    """Reads what `Cluster.parse` reads, as one cluster, or `8-4096xh100` as clusters of 8, 16, … 4,096 devices.

    Raises:
        InvalidArgument: the name is unknown, or a count is not allowed.
    """
    match = re.fullmatch(r"(\d{1,9})-(\d{1,9})x(\w+)", text.strip().lower())
    if match is None:
        return [Cluster.parse(text)]
    clusters = [Cluster.parse(f"{match[1]}x{match[3]}")]
    last = Cluster.parse(f"{match[2]}x{match[3]}").count
    while clusters[-1].count < last:
        clusters.append(replace(clusters[-1], count=2 * clusters[-1].count))
    if clusters[-1].count != last or len(clusters) == 1:
        raise InvalidArgument(f"devices {text!r}: the second number must be 2, 4, 8, … times the first")
    return clusters


def scaling(info: ModelInfo, clusters: Sequence[Cluster], mfu: float, batch_tokens: int) -> dict[str, list[ScalingRow]]:
    """Returns a row for each cluster, in two tables.

    In `strong` scaling a step takes `batch_tokens` on any number of devices. In `weak` scaling each device has as many
    tokens as it has in the last row of the other table, so that both end alike.

    Args:
        info: the model, counted at the context length in bfloat16.
        clusters: the devices, from few to many.
        mfu: the share of the peak of matrix products that a device is assumed to reach.
        batch_tokens: how many tokens a step takes.
    """
    most = clusters[-1].count
    papers = [Paper(info=info, cluster=cluster, mfu=mfu) for cluster in clusters]
    return {
        "strong": _rows([(paper, batch_tokens) for paper in papers]),
        "weak": _rows([(paper, max(1, batch_tokens * paper.cluster.count // most)) for paper in papers]),
    }


def _rows(steps: Sequence[tuple[Paper, int]]) -> list[ScalingRow]:
    rows: list[ScalingRow] = []
    for paper, batch_tokens in steps:
        split = split_rows(paper, batch_tokens)
        figures = {figure.name: figure for figure in training_figures(paper, batch_tokens)}
        memory, step, a_day = (figures[name] for name in ("memory a device", "time a step", "tokens a day"))
        assert step.assumed is not None
        assert step.bound is not None
        assert a_day.assumed is not None
        row = ScalingRow(
            devices=paper.cluster.count,
            tokens=int(figures["tokens a step"].value),
            context_parallel=split.context_parallel,
            memory=memory.value,
            fits=fits(paper, split),
            seconds=step.assumed,
            slowest=step.bound[1],
            tokens_a_day=a_day.assumed,
        )
        first = rows[0] if rows else row
        rows.append(replace(row, efficiency=row.tokens_a_day / row.devices / (first.tokens_a_day / first.devices)))
    return rows
