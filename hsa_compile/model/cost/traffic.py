"""What the processes of a training step send each other, in bytes: each line a formula, for one group of processes."""

from dataclasses import dataclass
from typing import Final

from hsa_compile.model.config import ModelConfig
from hsa_compile.model.cost.info import num_positions
from hsa_compile.model.cost.scale import ITEMSIZE, Figure, Paper, Times
from hsa_compile.model.layers.picked_chunks import ChunkTraffic

ALL_TO_ALL: Final = "all-to-all"
GATHER: Final = "gather"
REDUCE_SCATTER: Final = "reduce-scatter"
ALL_REDUCE: Final = "all-reduce"
KINDS = (ALL_TO_ALL, GATHER, REDUCE_SCATTER, ALL_REDUCE)
WEIGHT_BYTES = 4  # Weights travel in float32, which they are kept in, and so do their gradients.
_COUNT_BYTES = 8  # how many tokens come, int64; so are an expert's load, and sums are float64
_CONV_WIDTH = 4  # as Mamba-2's convolution has it


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How the rows of a step lie on the devices.

    Attributes:
        rows: how many texts a step has.
        data_parallel: how many groups of devices have rows of their own.
        context_parallel: how many devices share each row.
        expert_parallel: how many devices of a node share the experts of a layer; FSDP spreads what each holds.
        parts: into how many parts a group's rows are cut, which run one after the other.
        recomputes: whether layers are computed again in the backward pass (activation checkpointing).
        fetched: how many chunks of others a device gets for one text at one retrieval, on average; what each kv head
            has of a chunk counts. None where the chunks of whole texts are gathered.
    """

    rows: int
    data_parallel: int
    context_parallel: int
    expert_parallel: int
    parts: int = 1
    recomputes: bool = True
    fetched: float | None = None

    @property
    def devices(self) -> int:
        """How many devices there are."""
        return self.data_parallel * self.context_parallel

    @property
    def forwards(self) -> int:
        """How often a layer is computed in a step."""
        return 2 if self.recomputes else 1

    def tokens_at_once(self, context: int) -> int:
        """Returns how many tokens are on one device at a time."""
        return -(-self.rows // (self.data_parallel * self.parts)) * -(-context // self.context_parallel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What a device exchanges with its group in a step.

    Attributes:
        kind: one of `KINDS`.
        bytes: what the group brings together on one device. A device sends that, but for the share that it keeps.
        group: how many devices the group has.
        stride: how far apart the devices of the group are; 1 if they are neighbours.
    """

    kind: str
    bytes: float
    group: int
    stride: int = 1

    @property
    def sent(self) -> float:
        """The bytes that a device sends, on average over the group."""
        return self.bytes * (1 - 1 / self.group)

    def in_node(self, node_devices: int) -> float:
        """Returns how many devices of a group are in one node."""
        return min(self.group, max(1, node_devices // self.stride))


def messages(paper: Paper, split: Split, itemsize: int = ITEMSIZE) -> list[Message]:
    """Returns all that a device sends in a step of training.

    Experts are taken to be equally busy, and rows to be cut into equal parts.

    Args:
        paper: the model and its context length; the devices are those of the split.
        split: how work is spread.
        itemsize: bytes of a number of the activations that travel.
    """
    return [
        *_weights(paper, split),
        *_tokens_of_experts(paper, split, itemsize),
        *_shared_rows(paper, split, itemsize),
        _sums(paper, split),
    ]


def _weights(paper: Paper, split: Split) -> list[Message]:
    """FSDP gathers a layer forward and backward, and the rest (embedding, encoder, output) once."""
    info, owners = paper.info, split.expert_parallel
    shared = paper.expert_parameters if owners > 1 else 0
    in_layers = sum(layer.parameters for layer in info.layers) - shared
    rest = info.parameters - shared
    here, replicas = shared / owners, split.devices // owners
    bytes_ = WEIGHT_BYTES * split.parts
    return [
        Message(kind=GATHER, bytes=bytes_ * (rest + in_layers), group=split.devices),
        Message(kind=REDUCE_SCATTER, bytes=bytes_ * rest, group=split.devices),
        Message(kind=GATHER, bytes=bytes_ * 2 * here, group=replicas, stride=owners),
        Message(kind=REDUCE_SCATTER, bytes=bytes_ * here, group=replicas, stride=owners),
    ]


def _tokens_of_experts(paper: Paper, split: Split, itemsize: int) -> list[Message]:
    """Tokens go to their experts and back in each forward pass, and so do gradients; before them, how many come."""
    config = paper.config
    tokens = split.rows * num_positions(config, paper.info.context) / split.devices
    trips = 2 * (split.forwards + 1)
    travelling = trips * itemsize * tokens * config.experts_per_token * config.dim
    counts = split.forwards * split.parts * _COUNT_BYTES * config.num_experts
    return [Message(kind=ALL_TO_ALL, bytes=paper.num_moe * (travelling + counts), group=split.expert_parallel)]


def _shared_rows(paper: Paper, split: Split, itemsize: int) -> list[Message]:
    """Sends the chunk memory once, or picked chunks for each retrieval; for each layer, the places before a part.

    Landmarks are gathered in any case. Gradients go the same ways back.
    """
    config, parts, memory = paper.config, split.context_parallel, paper.info.memory
    texts = split.rows / split.data_parallel
    pairs, fetches = memory.chunk_keys + memory.chunk_values, 0.0
    if split.fetched is not None:
        pairs, fetches = 0, paper.num_retrieving * _fetches(paper, split, split.fetched, itemsize)
    of_landmarks = max(4, itemsize) if config.retrieval_norm else itemsize  # they stay as the norm gives them
    in_memory = (pairs * itemsize + memory.landmarks * of_landmarks) / ITEMSIZE
    places = num_positions(config, paper.info.context) // parts
    mixers = [spec.mixer for spec in config.layers]
    windows = mixers.count("window") * (split.forwards + 1) * _places_before(config.window - 1, places, parts)
    seams = windows * 2 * config.num_kv_heads * config.head_dim * itemsize
    inner, num_mamba = config.mamba_expand * config.dim, mixers.count("mamba")
    before = num_mamba * (split.forwards + 1) * _places_before(_CONV_WIDTH - 1, places, parts)
    seams += before * (inner + 2 * config.state_dim) * itemsize
    if config.has_landmark_tokens:  # picks are int32 and have no gradient; their weights are float32
        picks = paper.num_retrieving * config.memory_kv_heads * config.top_k
        seams += picks * 4 * (2 * split.forwards + 1)
    # Mamba-2's states are float32, and the logarithms of their decays float64.
    states = num_mamba * parts * (4 * inner * config.state_dim + 8 * inner // config.mamba_head_dim)
    return [
        Message(kind=ALL_TO_ALL, bytes=texts * seams + fetches, group=parts),
        Message(kind=GATHER, bytes=texts * (in_memory + split.forwards * states), group=parts),
        Message(kind=REDUCE_SCATTER, bytes=texts * (in_memory + states), group=parts),
    ]


def _fetches(paper: Paper, split: Split, fetched: float, itemsize: int) -> float:
    """Returns the bytes of one retrieval: how many chunks are asked for, which, the chunks, and their gradients."""
    config, parts = paper.config, split.context_parallel
    counts = split.forwards * split.parts * _COUNT_BYTES * parts
    chunk = 2 * config.chunk_size * config.memory_head_dim * itemsize
    each = split.forwards * (_COUNT_BYTES + chunk) + chunk
    return counts + split.rows / split.data_parallel * fetched * each / (1 - 1 / parts)


def chunk_traffic(paper: Paper, split: Split) -> ChunkTraffic:
    """Returns how many chunks come to a device in the two ways of reading chunks of others, if picks are random."""
    return ChunkTraffic.of(
        paper.config,
        parts=split.context_parallel,
        rows=split.rows / split.data_parallel,
        places=num_positions(paper.config, paper.info.context),
        forwards=split.forwards,
    )


def _places_before(count: int, part: int, parts: int) -> float:
    """Returns how many of the `count` places before a part there are, on average over all parts but the first."""
    if parts == 1:
        return 0
    short = min(parts - 1, count // max(part, 1))  # so many parts have fewer than `count` places before them
    return (part * short * (short + 1) / 2 + (parts - 1 - short) * count) / (parts - 1)


def _sums(paper: Paper, split: Split) -> Message:
    """Counts of text and answers, sums and own times of devices, the norm of the gradient; the loads of all experts."""
    loads = paper.num_moe * paper.config.num_experts
    return Message(kind=ALL_REDUCE, bytes=2 * (_COUNT_BYTES * (2 + 5 + split.devices + loads) + 4), group=split.devices)


def sent_figures(paper: Paper, split: Split) -> list[Figure]:
    """Returns a line for each kind of collective: what a device sends in a step."""
    trips = 2 * (split.forwards + 1)
    gathered, sent_on = ("chunk memory", "") if split.fetched is None else ("landmarks", " and picked chunks")
    formulas = {
        ALL_TO_ALL: f"{trips} x {ITEMSIZE} B x tokens x experts a token x dim x MoE layers, + what lies before a part"
        + sent_on,
        GATHER: f"{WEIGHT_BYTES} B x (2 x layers + the rest, experts / expert parallel) x parts, + {gathered}",
        REDUCE_SCATTER: f"{WEIGHT_BYTES} B x (parameters, experts / expert parallel) x parts, + {gathered}",
        ALL_REDUCE: f"2 x ({_COUNT_BYTES} B x (experts x MoE layers + devices + 6) + 4 B)",
    }
    sent = dict.fromkeys(KINDS, 0.0)
    for message in messages(paper, split):
        sent[message.kind] += message.sent
    return [
        Figure(name=f"sent: {kind}", value=sent[kind], unit="B", formula=f"({formulas[kind]}) x (1 - 1 / group)")
        for kind in KINDS
    ]


def wires(paper: Paper, split: Split) -> dict[str, Times]:
    """Returns the time that all of it takes; a device's rank in its node does not matter, since all send at once."""
    cluster = paper.cluster
    on_links, to_node = 0.0, 0.0
    for message in messages(paper, split):
        here = message.in_node(cluster.node_devices)
        on_links += message.bytes * (1 - 1 / here)
        to_node += message.bytes * cluster.node_devices / here * (1 - here / message.group)
    return paper.wires(on_links, to_node)


def decode_sent(config: ModelConfig, devices: int) -> float:
    """Returns the bytes that a device sends for each new token of a text whose memory several devices share.

    Each retrieval gathers a score and a number of eight bytes each for every pick; each layer that reads adds up its
    outputs in float32. In DRT a retrieval serves a whole chunk.
    """
    candidates = 2 * 8 * config.memory_kv_heads * config.top_k
    outputs = 4 * config.memory_heads * config.memory_head_dim
    tokens_served = config.chunk_size if config.has_landmark_tokens else 1
    retrievals = sum(spec.retrieves for spec in config.layers) / tokens_served
    reading = sum(spec.reads_memory for spec in config.layers)
    return retrievals * candidates * (devices - 1) + reading * 2 * outputs * (1 - 1 / devices)
