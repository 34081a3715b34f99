"""Training and serving on many devices, on paper: how work is spread, what is kept in memory, computed and sent."""

import math
from dataclasses import replace

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.config import AUTO, ModelConfig
from hsa_compile.model.cost.info import LayerInfo
from hsa_compile.model.cost.scale import (
    ITEMSIZE,
    NETWORK_GB_S,
    NODE_DEVICES,
    USABLE_MEMORY,
    Figure,
    Paper,
    Times,
    longest,
    memory_seconds,
)
from hsa_compile.model.cost.traffic import WEIGHT_BYTES, Split, chunk_traffic, decode_sent, sent_figures, wires
from hsa_compile.model.inference.inference import upper_reach
from hsa_compile.model.inference.parts import end_read
from hsa_compile.model.transformer import empty_model

_DECODE_FORMULA = "longest of FLOPs / peak, (weights used once + landmarks x retrievals + caches + picks) / bandwidth"

DEFAULT_BATCH_TOKENS = 4 * 2**20
STATE_BYTES = 16  # bytes that a parameter takes: float32 weight and gradient, AdamW's two moments
LOGITS = 4096  # how many tokens have logits at a time, as train.loss_chunk
_DAY = 86400.0
_TRILLION = 1e12


def split_rows(paper: Paper, batch_tokens: int) -> Split:
    """Gives each row as few devices as there are rows for, and cuts a step into as few parts as memory allows.

    Raises:
        InvalidArgument: batch_tokens is below 1.
    """
    if batch_tokens < 1:
        raise InvalidArgument(f"batch_tokens = {batch_tokens} must be at least 1")
    devices, rows = paper.cluster.count, max(1, batch_tokens // paper.info.context)
    groups = math.gcd(devices, rows)
    experts = paper.config.num_experts if paper.num_moe else 1
    split = Split(
        rows=rows,
        data_parallel=groups,
        context_parallel=devices // groups,
        expert_parallel=math.gcd(paper.cluster.node_devices, experts),
    )
    traffic = chunk_traffic(paper, split)
    if paper.config.has_memory and split.context_parallel > 1 and traffic.travels(AUTO):
        split = replace(split, fetched=traffic.fetched / traffic.rows * paper.config.memory_kv_heads)
    rows_of_a_group = rows // groups
    for parts in (number for number in range(1, rows_of_a_group + 1) if rows_of_a_group % number == 0):
        tried = replace(split, parts=parts)
        if fits(paper, tried):
            return tried
    return replace(split, parts=rows_of_a_group)


def training_figures(paper: Paper, batch_tokens: int = DEFAULT_BATCH_TOKENS) -> list[Figure]:
    """Returns all lines on training.

    Args:
        paper: the model and the devices.
        batch_tokens: how many tokens an optimizer step takes; it has at least one row of the context length.
    """
    split = split_rows(paper, batch_tokens)
    figures = [*_split_figures(paper, split), *_memory_figures(paper, split)]
    if paper.config.has_memory and split.context_parallel > 1:
        figures += _exchange_figures(paper, split)
    return [*figures, *_time_figures(paper, split)]


def _split_figures(paper: Paper, split: Split) -> list[Figure]:
    def plain(name: str, value: int, formula: str) -> Figure:
        return Figure(name=name, value=value, unit="", formula=formula)

    tokens = split.rows * paper.info.context
    return [
        Figure(name="tokens a step", value=tokens, unit="tokens", formula="rows x context, near --batch-tokens"),
        plain("data parallel", split.data_parallel, "gcd(devices, rows); weights and AdamW spread by FSDP2"),
        plain("context parallel", split.context_parallel, "devices / data parallel: devices that share a row"),
        plain("expert parallel", split.expert_parallel, "gcd(devices of a node, experts)"),
        plain("parts of a step", split.parts, "fewest, one after the other, that fit in memory"),
    ]


def _memory_figures(paper: Paper, split: Split) -> list[Figure]:
    verdict = "fits" if fits(paper, split) else "DOES NOT FIT"
    formula = f"{verdict} in {USABLE_MEMORY:g} x {paper.limits.memory_gb:g} GB"
    rows = _memory(paper, split)
    return [
        Figure(name="memory a device", value=sum(bytes_ for _, bytes_, _ in rows), unit="B", formula=formula),
        *(Figure(name=f"memory: {name}", value=bytes_, unit="B", formula=formula) for name, bytes_, formula in rows),
    ]


def fits(paper: Paper, split: Split) -> bool:
    """Returns whether a device has the memory that a step takes."""
    return sum(bytes_ for _, bytes_, _ in _memory(paper, split)) <= USABLE_MEMORY * paper.limits.memory_gb * 1e9


def _exchange_figures(paper: Paper, split: Split) -> list[Figure]:
    """Returns what the two ways to read chunks of other devices send and keep; the one that sends less is taken."""
    traffic, memory = chunk_traffic(paper, split), paper.info.memory
    chunk = (memory.chunk_keys + memory.chunk_values) / max(traffic.chunks, 1)
    sends = {
        "gathered": (traffic.gathered, "keys, values and gradients of all other chunks, once"),
        "picked": (
            traffic.travelled,
            "those of distinct picks, at each retrieval: picks at random; of tiny, 0.14 … 0.31 of that",
        ),
    }
    kept = {way: _chunk_memory(paper, split, travels=way == "picked") for way in sends}
    taken = "gathered" if split.fetched is None else "picked"
    figures = []
    for way, (chunks, formula) in sends.items():
        note = "TAKEN, sends less: " if way == taken else ""
        figures += [
            Figure(name=f"{way} chunks: sent", value=chunks * chunk, unit="B", formula=note + formula),
            Figure(name=f"{way} chunks: memory", value=kept[way][0], unit="B", formula=kept[way][1]),
        ]
    return figures


def _memory(paper: Paper, split: Split) -> list[tuple[str, float, str]]:
    """Returns name, bytes and formula of what a device holds; layers compute activations again (checkpointing)."""
    info, config = paper.info, paper.config
    tokens = split.tokens_at_once(info.context)
    of_a_layer = max(_on_a_device(paper, layer, split) for layer in info.layers)
    root = info.embedding_parameters + info.encoder_parameters
    return [
        ("weights, gradients, AdamW", STATE_BYTES * info.parameters / paper.cluster.count,
         f"{STATE_BYTES} B x parameters / devices"),
        ("gathered weights", 3 * WEIGHT_BYTES * of_a_layer + 2 * WEIGHT_BYTES * root,
         f"{WEIGHT_BYTES} B x (3 x largest layer (experts / expert parallel) + 2 x (embedding + encoder))"),
        ("inputs of the layers", ITEMSIZE * tokens * config.dim * config.num_layers, "2 B x tokens x dim x layers"),
        ("activations of a layer", ITEMSIZE * tokens * max(_kept(paper, layer) for layer in info.layers),
         "2 B x tokens x widths of all that the largest layer keeps"),
        ("activations of the encoder", ITEMSIZE * tokens * _kept_by_encoder(config),
         "2 B x tokens x widths of all that the chunk encoder keeps"),
        ("chunk memory", *_chunk_memory(paper, split, travels=split.fetched is not None)),
        ("logits", 2 * 4 * LOGITS * config.vocab_size, f"2 x 4 B x {LOGITS} tokens x vocabulary"),
    ]  # fmt: skip


def _chunk_memory(paper: Paper, split: Split, *, travels: bool) -> tuple[float, str]:
    """Returns the bytes and the formula of the chunks that the device with the most of them holds."""
    memory, rows = paper.info.memory, -(-split.rows // (split.data_parallel * split.parts))
    pairs = memory.chunk_keys + memory.chunk_values
    if not travels:
        return 2 * (pairs + memory.landmarks) * rows, "2 x (chunk keys, values, landmarks of the rows): with gradients"
    traffic = chunk_traffic(paper, split)
    # Chunks that several layers read stay until the backward pass; else there are those of one retrieval at a time.
    retrievals = 1 if paper.num_reading == paper.num_retrieving else paper.num_retrieving
    picked = pairs * retrievals * traffic.kept / traffic.rows / max(traffic.chunks, 1)
    return (
        2 * (pairs / split.context_parallel + picked + memory.landmarks) * rows,
        "2 x (own chunk keys, values, + those of distinct picks at random, + landmarks of the rows): with gradients",
    )


def _on_a_device(paper: Paper, layer: LayerInfo, split: Split) -> float:
    """Counts the parameters of a layer that are on a device while the layer runs."""
    experts = paper.expert_parameters / paper.num_moe if layer.mlp == "moe" else 0
    return layer.parameters - experts + experts / split.expert_parallel


def _kept(paper: Paper, layer: LayerInfo) -> int:
    """Counts the numbers that a layer keeps of a token for its backward pass: what products, norms and gates need."""
    config = paper.config
    width = 4 * config.dim
    inner = config.mamba_expand * config.dim
    pairs = config.num_heads + 2 * config.num_kv_heads
    width += {"window": 3 * pairs * config.head_dim, "full": 3 * pairs * config.head_dim, "mamba": 6 * inner}.get(
        layer.mixer, 0
    )
    if layer.reads_memory:
        width += config.dim + 3 * config.memory_heads * config.memory_head_dim
    if layer.retrieves:  # it keeps float32 weights and int32 indices
        width += 2 * config.memory_kv_heads * (config.retrieval_dim + 2 * config.top_k)
    if layer.mlp == "dense":
        width += 2 * config.dim + 4 * config.ffn_dim
    if layer.mlp == "moe":
        width += 2 * config.dim + config.experts_per_token * (2 * config.dim + 4 * config.expert_dim)
        width += config.num_shared_experts * 4 * config.expert_dim
    return width


def _kept_by_encoder(config: ModelConfig) -> int:
    """Counts the numbers that the chunk encoder keeps of a token; it computes nothing again."""
    if not config.has_memory:
        return 0
    pairs = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    width = config.encoder_layers * (6 * config.dim + 3 * pairs + 4 * config.encoder_ffn_dim)
    pooled = config.memory_kv_heads * config.retrieval_dim if config.pooled_landmarks else 0
    return (width + 2 * config.dim) * (config.chunk_size + 1) // config.chunk_size + pooled


def _time_figures(paper: Paper, split: Split) -> list[Figure]:
    tokens = split.rows * paper.info.context
    share = split.rows / paper.cluster.count  # how many whole texts a device's work amounts to
    parts = {
        "dense products": (
            paper.matrix(3 * paper.dense_flops * tokens / paper.cluster.count),
            "3 x forward FLOPs outside our kernels x tokens / devices / peak",
        ),
        "retrieval": (
            (paper.kernels("select_chunks", training=True) + paper.kernels("select_chunks_backward", training=True))
            * share,
            "slowest clock of select_chunks, forward and backward, x layers that retrieve x rows / devices",
        ),
        "chunk attention": (
            (paper.kernels("hsa_forward", training=True) + paper.kernels("hsa_backward", training=True)) * share,
            f"slowest clock of hsa_attention, forward ({paper.dataflow('hsa_forward', training=True)}) and backward "
            f"({paper.dataflow('hsa_backward', training=True)}), x layers that read x rows / devices",
        ),
    }
    on_wires = wires(paper, split)
    compute = Times(peak=0.0, assumed=0.0)
    for times, _ in parts.values():
        compute = compute + times
    step, bound = longest({"compute": compute, **on_wires})
    wire_formulas = (
        f"what a device gets from its node, of all that is sent / {paper.limits.scale_up_gb_s:g} GB/s",
        f"what a node gets from others, of all that is sent / ({NODE_DEVICES} x {NETWORK_GB_S} GB/s)",
    )
    return [
        Figure(name="FLOPs a token", value=paper.info.training_flops, unit="FLOPs", formula="3 x forward"),
        compute.figure("compute", "the sum of:"),
        *(times.figure(f"compute: {name}", formula) for name, (times, formula) in parts.items()),
        *sent_figures(paper, split),
        *(
            times.figure(name, formula)
            for (name, times), formula in zip(on_wires.items(), wire_formulas, strict=True)
        ),
        step.figure("time a step", "the longest of compute, links, network: they overlap", bound),
        *_rates(tokens, step),
    ]  # fmt: skip


def _rates(tokens: int, step: Times) -> list[Figure]:
    a_day = Times(peak=tokens * _DAY / step.peak, assumed=tokens * _DAY / step.assumed)
    return [
        Figure(name="tokens a day", value=a_day.peak, assumed=a_day.assumed, unit="tokens",
               formula="tokens a step x 86,400 s / time a step"),
        Figure(name="days for 1T tokens", value=_TRILLION / a_day.peak, assumed=_TRILLION / a_day.assumed, unit="days",
               formula="10^12 / tokens a day"),
    ]  # fmt: skip


def serving_figures(paper: Paper) -> list[Figure]:
    """Returns all lines on serving; each device holds the whole model, and has texts of its own."""
    return [*_room(paper), *_prefill(paper), *_decode(paper)]


def _kept_bytes(paper: Paper) -> tuple[float, float]:
    """Returns the bytes that a text takes: what stays on the device in any case, and chunk keys and values."""
    memory = paper.info.memory
    return memory.caches + memory.landmarks, memory.chunk_keys + memory.chunk_values


def _texts(paper: Paper, bytes_: float) -> int:
    """Returns how many texts of so many bytes fit beside the weights."""
    room = USABLE_MEMORY * paper.limits.memory_gb * 1e9 - paper.info.memory.weights
    return max(0, int(room // bytes_))


def _room(paper: Paper) -> list[Figure]:
    stays, chunks = _kept_bytes(paper)
    room = f"({USABLE_MEMORY:g} x {paper.limits.memory_gb:g} GB - weights)"
    figures = [
        Figure(name="weights", value=paper.info.memory.weights, unit="B", formula="2 B x parameters, on each device"),
        Figure(name="memory a text", value=stays + chunks, unit="B", formula="caches + landmarks + chunk keys, values"),
        Figure(name="texts a device", value=_texts(paper, stays + chunks), unit="texts",
               formula=f"{room} / memory a text"),
    ]  # fmt: skip
    if not paper.config.has_memory:
        return figures
    if paper.cluster.count > 1:
        devices = paper.cluster.count
        share = paper.info.memory.caches + (stays - paper.info.memory.caches + chunks) / devices
        figures += [
            Figure(name="shared by all devices: memory a text", value=share, unit="B",
                   formula="caches + (landmarks + chunk keys, values) / devices, on each"),
            Figure(name="shared by all devices: sent a token", value=decode_sent(paper.config, devices),
                   unit="B", formula="16 B x kv heads x picks x (devices - 1) a retrieval + 8 B x heads x head dim x "
                   "(1 - 1 / devices) a reading layer"),
        ]  # fmt: skip
    return [
        *figures,
        Figure(name="texts a device, chunks in the host", value=_texts(paper, stays), unit="texts",
               formula=f"{room} / (caches + landmarks)"),
        Figure(name="host memory a text", value=chunks, unit="B", formula="2 B x tokens x kv heads x head dim x 2"),
    ]  # fmt: skip


def _prefill(paper: Paper) -> list[Figure]:
    info = paper.info
    reach = upper_reach(empty_model(paper.config))
    flops = info.prefill_flops * info.context
    formula = "prefill FLOPs x context / peak"
    if reach is not None:
        flops += (info.forward_flops - info.prefill_flops) * min(reach, info.context)
        formula = f"(lower half x context + all else x last {min(reach, info.context):,} tokens) / peak"
    alone = {"compute": paper.matrix(flops)}
    if paper.config.has_memory:
        host = _kept_bytes(paper)[1] / (paper.limits.host_gb_s * 1e9)
        alone["PCIe to the host"] = Times(peak=host, assumed=host)
    one, bound = longest(alone)
    figures = [one.figure("prefill, one device", formula, bound)]
    if paper.cluster.count > 1 and paper.config.has_memory and reach is not None:
        figures.append(_shared_prefill(paper, reach))
    return figures


def _shared_prefill(paper: Paper, reach: int) -> Figure:
    """Returns the time in which all devices read one text: each a part, and all of them the end."""
    info, devices = paper.info, paper.cluster.count
    again = paper.config.lower_reach + end_read(paper.config, reach)
    part, last = min(info.context, info.context / devices + again), min(reach, info.context)
    flops = info.prefill_flops * part + (info.forward_flops - info.prefill_flops) * last
    host = _kept_bytes(paper)[1] / devices / (paper.limits.host_gb_s * 1e9)
    time, bound = longest({"compute": paper.matrix(flops), "PCIe to the host": Times(peak=host, assumed=host)})
    formula = f"(lower half x (context / devices + {again:,} tokens) + all else x last {last:,}) / peak"
    return time.figure("prefill, all devices", formula, bound)


def _decode(paper: Paper) -> list[Figure]:
    stays, chunks = _kept_bytes(paper)
    figures = []
    on_device, in_host = _texts(paper, stays + chunks), _texts(paper, stays)
    for name, texts, host in (
        ("decode a token of 1 text", min(1, on_device), False),
        ("decode a token of 1 text, chunks in the host", min(1, in_host), True),
        ("decode a token of all texts a device", on_device, False),
        ("decode a token of all texts a device, chunks in the host", in_host, True),
    ):
        if texts < 1 or (host and not paper.config.has_memory):
            continue
        time, bound = _token(paper, texts, host)
        figures.append(time.figure(name, _DECODE_FORMULA if not host else "the same, picked chunks over PCIe", bound))
    rate = (in_host or on_device) * paper.cluster.count
    if figures and rate:
        figures.append(_rate(paper, rate, time))
    return figures


def _rate(paper: Paper, texts: int, time: Times) -> Figure:
    return Figure(
        name="tokens a second, all devices",
        value=texts / time.peak,
        assumed=texts / time.assumed,
        unit="tokens/s",
        formula="texts a device x devices / time of the line above",
    )


def _token(paper: Paper, texts: int, host: bool) -> tuple[Times, tuple[str, str]]:
    """Returns the time of one token more for each of so many texts at once."""
    config, memory = paper.config, paper.info.memory
    picks = paper.num_reading * config.top_k * config.chunk_size * config.memory_kv_heads * config.memory_head_dim
    picked = min(2 * ITEMSIZE * picks, paper.num_reading * (memory.chunk_keys + memory.chunk_values))
    read = _weights_used(paper, texts) + texts * (memory.landmarks * paper.num_retrieving + memory.caches)
    wait = memory_seconds(read + (0 if host else texts * picked), paper.limits)
    times = {
        "products": paper.matrix(texts * paper.info.forward_flops),
        "device memory": Times(peak=wait, assumed=wait),
    }
    if host:
        pcie = texts * picked / (paper.limits.host_gb_s * 1e9)
        times["PCIe to the host"] = Times(peak=pcie, assumed=pcie)
    return longest(times)


def _weights_used(paper: Paper, texts: int) -> float:
    """Returns the bytes of weights that a step reads; experts count if some text is expected to choose them."""
    config, info = paper.config, paper.info
    rest = info.parameters - paper.expert_parameters
    if not paper.num_moe:
        return ITEMSIZE * rest
    chosen = 1 - (1 - config.experts_per_token / config.num_experts) ** texts
    return ITEMSIZE * (rest + chosen * paper.expert_parameters)
