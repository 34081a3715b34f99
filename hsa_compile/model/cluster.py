"""Many devices of one kind, on paper: how many, which, and what the wires between them carry."""

import re
from dataclasses import dataclass

from hsa_compile.errors import InvalidTarget
from hsa_compile.peaks import Limits, limits_of
from hsa_compile.target import NAMED_TARGETS, PRODUCTS, Target

NODE_DEVICES = 8  # HGX A100, H100, H200 and B200 boards, and the MI300X platform
# An assumption, as usual where such nodes are sold: a 400 Gb/s InfiniBand or RoCE adapter for each device, one way.
NETWORK_GB_S = 50
MAX_DEVICES = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Nodes of eight devices; fewer than eight are one node.

    Attributes:
        count: of devices.
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
        """Peaks of one device."""
        return limits_of(self.target)

    @property
    def node_devices(self) -> int:
        """Devices of a node."""
        return min(self.count, NODE_DEVICES)

    @property
    def num_nodes(self) -> int:
        """How many nodes there are."""
        return self.count // self.node_devices

    @staticmethod
    def parse(text: str) -> "Cluster":
        """From `64xH100`, `h200` or `16xsm_90`: a count, and a product or an architecture.

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
