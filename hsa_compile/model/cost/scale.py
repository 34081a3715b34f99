"""Models on many devices, on paper: what devices and wires can do by the roofline, and figures with their formulas."""

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hsa_compile.errors import InvalidArgument, InvalidTarget
from hsa_compile.model.config import DEFAULT_MFU, ModelConfig
from hsa_compile.model.cost.info import ModelInfo
from hsa_compile.model.cost.workload import problems
from hsa_compile.peaks import Limits, limits_of
from hsa_compile.problem import Problem
from hsa_compile.schedules.ops import count_work
from hsa_compile.schedules.ops.backend import Work, clocks
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import SearchSpace
from hsa_compile.target import NAMED_TARGETS, PRODUCTS, Target

NODE_DEVICES = 8  # HGX A100, H100, H200 and B200 boards, and the MI300X platform
# As usual where such nodes are sold, each device has a 400 Gb/s InfiniBand or RoCE adapter; this is what one way takes.
NETWORK_GB_S = 50
MAX_DEVICES = 1_000_000
USABLE_MEMORY = 0.9  # a share of a device's memory; the rest is the runtime's, and what an allocator loses
DTYPE, ITEMSIZE = "bfloat16", 2  # all but the optimizer's state is kept in this dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Nodes of eight devices; fewer than eight are one node.

    Attributes:
        count: how many devices there are.
        target: what each of them is.
    """

    count: int
    target: Target

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MAX_DEVICES:
            raise InvalidTarget(f"count = {self.count} must be in 1 … {MAX_DEVICES} devices")
        if self.count > NODE_DEVICES and self.count % NODE_DEVICES:
            raise InvalidTarget(
                f"count = {self.count} must be at most {NODE_DEVICES} or a multiple of it: devices come in nodes"
            )
        limits_of(self.target)

    @property
    def limits(self) -> Limits:
        """The peaks of one device."""
        return limits_of(self.target)

    @property
    def node_devices(self) -> int:
        """How many devices a node has."""
        return min(self.count, NODE_DEVICES)

    @staticmethod
    def parse(text: str) -> "Cluster":
        """Reads `64xH100`, `h200` or `16xsm_90`: a count, and a product or an architecture.

        Raises:
            InvalidTarget: the name is unknown, or the count is not allowed.
        """
        known = {**NAMED_TARGETS, **PRODUCTS}
        match = re.fullmatch(r"(?:(\d{1,9})x)?(\w+)", text.strip().lower())
        if match is None or match[2] not in known:
            raise InvalidTarget(
                f"devices {text!r} are not known; allowed is a count and a name, as in 64xh100, of {', '.join(known)}"
            )
        return Cluster(count=int(match[1] or 1), target=known[match[2]])


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of the tables that are printed.

    Attributes:
        name: what the figure is.
        value: the figure at the device's peaks, which is a bound where it is a time or a rate.
        unit: `B`, `s`, `FLOPs`, `tokens`, `tokens/s`, `texts`, `days` or empty for a plain number.
        assumed: the figure if matrix products reach the assumed share of their peak; None where that changes nothing.
        formula: how the figure comes about.
        bound: where a time is the longest of several, the name of the slowest, at the peaks and as assumed.
    """

    name: str
    value: float
    unit: str
    formula: str
    assumed: float | None = None
    bound: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds for which something keeps a device or a wire busy.

    Attributes:
        peak: seconds if matrix products run at their peak.
        assumed: seconds if they reach the assumed share of it.
    """

    peak: float
    assumed: float

    def __add__(self, other: "Times") -> "Times":
        return Times(peak=self.peak + other.peak, assumed=self.assumed + other.assumed)

    def __mul__(self, factor: float) -> "Times":
        return Times(peak=self.peak * factor, assumed=self.assumed * factor)

    def figure(self, name: str, formula: str, bound: tuple[str, str] | None = None) -> Figure:
        """Makes a line of these times."""
        return Figure(name=name, value=self.peak, assumed=self.assumed, unit="s", formula=formula, bound=bound)


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """A model on a cluster: what all figures come from.

    Attributes:
        info: the model, counted at the context length in bfloat16.
        cluster: the devices.
        mfu: share of the peak of matrix products that a device is assumed to reach.
    """

    info: ModelInfo
    cluster: Cluster
    mfu: float = DEFAULT_MFU

    def __post_init__(self) -> None:
        if not 0 < self.mfu <= 1:
            raise InvalidArgument(f"mfu = {self.mfu} must be more than 0 and at most 1")

    @property
    def config(self) -> ModelConfig:
        """The config of the model."""
        return self.info.config

    @property
    def limits(self) -> Limits:
        """The peaks of one device."""
        return self.cluster.limits

    @property
    def dense_flops(self) -> float:
        """FLOPs of a forward pass for a token, outside of our own kernels."""
        return self.info.forward_flops - sum(self.info.kernel_flops.values())

    @property
    def num_retrieving(self) -> int:
        """How many layers choose chunks."""
        return sum(spec.retrieves for spec in self.config.layers)

    @property
    def num_reading(self) -> int:
        """How many layers attend to chunks."""
        return sum(spec.reads_memory for spec in self.config.layers)

    @property
    def num_moe(self) -> int:
        """How many layers have experts."""
        return sum(spec.mlp == "moe" for spec in self.config.layers)

    @property
    def expert_parameters(self) -> int:
        """How many parameters all experts have that are chosen among."""
        return self.num_moe * self.config.num_experts * 3 * self.config.dim * self.config.expert_dim

    def matrix(self, flops: float) -> Times:
        """Returns the time of matrix products on one device."""
        seconds = flops / (self.limits.tflops * 1e12)
        return Times(peak=seconds, assumed=seconds / self.mfu)

    def kernels(self, op: str, *, training: bool) -> Times:
        """Returns the time of all layers' calls of one of our ops over a whole text on one device.

        The schedule is the one that the roofline favours in the whole space, which is what tuning may find.
        """
        layers = self.num_retrieving if op.startswith("select") else self.num_reading
        return _sum(self._roofline(problem) for problem in self._problems(op, training)) * layers

    def dataflow(self, op: str, *, training: bool) -> str:
        """Returns the dataflow that the roofline favours for an op; empty if the model does not ask for the op."""
        for problem in self._problems(op, training):
            return _favoured(problem, self.cluster.target).dataflow
        return ""

    def _problems(self, op: str, training: bool) -> list[Problem]:
        asked = problems(self.config, 1, self.info.context, DTYPE, training=training)
        return [problem for problem in asked if problem.op == op]

    def _roofline(self, problem: Problem) -> Times:
        work = count_work(problem, _favoured(problem, self.cluster.target))
        slower = replace(work, flops=work.flops / self.mfu)
        peak, assumed = (max(clocks(one, problem.itemsize, self.limits).values()) / 1e3 for one in (work, slower))
        return Times(peak=peak, assumed=assumed)

    def wires(self, scale_up_bytes: float, node_bytes: float) -> dict[str, Times]:
        """Returns the time to bring what a device takes from its node, and what enters a node from other nodes."""
        network = node_bytes / (self.cluster.node_devices * NETWORK_GB_S * 1e9)
        links = scale_up_bytes / (self.limits.scale_up_gb_s * 1e9)
        return {"links in a node": Times(peak=links, assumed=links), "network": Times(peak=network, assumed=network)}


@functools.cache
def _favoured(problem: Problem, target: Target) -> Schedule:
    """Returns the schedule with the shortest time by the roofline, of all valid ones."""
    limits, valid = limits_of(target), SearchSpace.of(problem, target).schedules()
    return min(
        valid, key=lambda schedule: max(clocks(count_work(problem, schedule), problem.itemsize, limits).values())
    )


def longest(times: dict[str, Times]) -> tuple[Times, tuple[str, str]]:
    """Returns the longest of times that run at once, at the peaks and as assumed, with the names of the two."""
    peak = max(times, key=lambda name: times[name].peak)
    assumed = max(times, key=lambda name: times[name].assumed)
    return Times(peak=times[peak].peak, assumed=times[assumed].assumed), (peak, assumed)


def memory_seconds(bytes_: float, limits: Limits) -> float:
    """Returns the seconds that reading so many bytes of device memory once takes, by the tuner's clock."""
    return clocks(Work(flops=0, memory_bytes=bytes_, cache_bytes=0), ITEMSIZE, limits)["memory"] / 1e3


def figures_to_dict(figures: Sequence[Figure]) -> dict[str, Any]:
    """Returns plain values by name, ready for JSON."""
    rows = [asdict(figure) for figure in figures]
    return {row.pop("name"): row for row in rows}


def _sum(times: Iterable[Times]) -> Times:
    return sum(times, Times(peak=0.0, assumed=0.0))
