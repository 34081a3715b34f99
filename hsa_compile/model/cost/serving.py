"""Reading and answering on many devices, on paper: how many texts fit, how long a prompt and a token take."""

from hsa_compile.model.cost.scale import ITEMSIZE, USABLE_MEMORY, Figure, Paper, Times, longest, memory_seconds
from hsa_compile.model.inference.inference import upper_reach
from hsa_compile.model.transformer import empty_model

_DECODE_FORMULA = "longest of FLOPs / peak, (weights used once + landmarks x retrievals + caches + picks) / bandwidth"


def serving_figures(paper: Paper) -> list[Figure]:
    """Returns all lines on serving; each device holds the whole model, and has texts of its own."""
    return [*_room(paper), *_prefill(paper), *_decode(paper)]


def _kept(paper: Paper) -> tuple[float, float]:
    """Returns the bytes that a text takes: what stays on the device in any case, and chunk keys and values."""
    memory = paper.info.memory
    return memory.caches + memory.landmarks, memory.chunk_keys + memory.chunk_values


def _texts(paper: Paper, bytes_: float) -> int:
    """Returns how many texts of so many bytes fit beside the weights."""
    room = USABLE_MEMORY * paper.limits.memory_gb * 1e9 - paper.info.memory.weights
    return max(0, int(room // bytes_))


def _room(paper: Paper) -> list[Figure]:
    stays, chunks = _kept(paper)
    room = f"({USABLE_MEMORY:g} x {paper.limits.memory_gb:g} GB - weights)"
    figures = [
        Figure(name="weights", value=paper.info.memory.weights, unit="B", formula="2 B x parameters, on each device"),
        Figure(name="memory a text", value=stays + chunks, unit="B", formula="caches + landmarks + chunk keys, values"),
        Figure(name="texts a device", value=_texts(paper, stays + chunks), unit="texts",
               formula=f"{room} / memory a text"),
    ]  # fmt: skip
    if not paper.config.has_memory:
        return figures
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
        host = _kept(paper)[1] / (paper.limits.host_gb_s * 1e9)
        alone["PCIe to the host"] = Times(peak=host, assumed=host)
    one, bound = longest(alone)
    figures = [one.figure("prefill, one device", formula, bound)]
    if paper.cluster.count > 1 and reach is not None:
        together = one * (1 / paper.cluster.count)
        figures.append(together.figure("prefill, all devices", "that / devices: pieces pass on windows alone", bound))
    return figures


def _decode(paper: Paper) -> list[Figure]:
    stays, chunks = _kept(paper)
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
