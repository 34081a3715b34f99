"""Figures on paper agree with counts by hand, with what PyTorch really keeps, and with the roofline of the tuner."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from small_models import build, combinations, small_config

from hsa_compile.autotune.cost.roofline import predict
from hsa_compile.errors import InvalidArgument
from hsa_compile.model.config import VARIANTS
from hsa_compile.model.cost.info import model_info
from hsa_compile.model.cost.phases import serving_figures, training_figures
from hsa_compile.model.cost.scale import Cluster, Figure, Paper
from hsa_compile.model.cost.traffic import Split, messages
from hsa_compile.model.cost.workload import problems
from hsa_compile.model.presets import PRESETS, preset
from hsa_compile.model.training.config import TrainConfig
from hsa_compile.model.training.optimizer import make_optimizer
from hsa_compile.schedules.ops import count_work
from hsa_compile.schedules.space import SearchSpace

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")


@cache
def paper(name: str = "0.5b", devices: str = "8xh100", context: int = 8192, **more: float) -> Paper:
    return Paper(info=model_info(preset(name), context=context), cluster=Cluster.parse(devices), **more)


def by_name(figures: list[Figure]) -> dict[str, Figure]:
    assert len({figure.name for figure in figures}) == len(figures)
    return {figure.name: figure for figure in figures}


def test_dense_products_take_their_flops_at_the_peak() -> None:
    one = paper()
    found = by_name(training_figures(one, 2**20))["compute: dense products"]
    kernels = sum(one.info.kernel_flops.values())
    assert found.value == pytest.approx(3 * (one.info.forward_flops - kernels) * 2**20 / 8 / 989e12)
    assert found.assumed == pytest.approx(found.value / 0.4)


@pytest.mark.parametrize(
    "op",
    [
        "hsa_forward",
        *(
            pytest.param(op, marks=pytest.mark.exhaustive)
            for op in ("select_chunks", "select_chunks_backward", "hsa_backward")
        ),
    ],
)
def test_our_kernels_take_what_the_tuner_predicts_of_their_best_schedule(op: str) -> None:
    one = paper("0.5b", "h100", 2**16)
    (problem,) = (p for p in problems(one.config, 1, 2**16, "bfloat16") if p.op == op)
    target = one.cluster.target
    best = min(
        predict(problem, count_work(problem, schedule), target).time_ms
        for schedule in SearchSpace.of(problem, target).schedules()
    )
    assert one.kernels(op, training=True).peak == pytest.approx(2 * best / 1e3)


def test_the_state_of_training_is_what_adamw_really_keeps() -> None:
    model = build(small_config("swa")).train()
    optimizer = make_optimizer(model, TrainConfig(steps=1))
    model(torch.zeros(1, 25, dtype=torch.int64)).sum().backward()
    optimizer.step()
    tensors = [*model.parameters(), *(weight.grad for weight in model.parameters() if weight.grad is not None)]
    tensors += [value for state in optimizer.state.values() for value in state.values() if value.dim() > 0]
    info = model_info(model.config, context=25)
    said = by_name(training_figures(Paper(info=info, cluster=Cluster.parse("h100")), 25))
    assert said["memory: weights, gradients, AdamW"].value == sum(tensor.nbytes for tensor in tensors)


def kept_by_training(config: object, tokens: int, *, checkpoint: bool) -> int:
    """Bytes of activations that autograd holds after a forward pass."""
    model = build(config).train()  # type: ignore[arg-type]
    model.checkpoint_activations = checkpoint
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    held: dict[int, torch.Tensor] = {}

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        hidden = model.hidden(torch.zeros(1, tokens, dtype=torch.int64), noise_seed=1)
    assert hidden.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["full", "hsa-ultralong"])
def test_activations_are_about_those_that_autograd_holds(variant: str) -> None:
    """In float32 here; the figures are for two bytes. Layers are alike, so that the largest stands for all."""
    tokens = 400
    config = small_config(variant, num_dense_layers=0, layers_per_group=1, num_lower_layers=0, num_groups=3, dim=128,
                          expert_dim=128, head_dim=32, encoder_ffn_dim=200)  # fmt: skip
    info = model_info(config, context=tokens)
    said = by_name(training_figures(Paper(info=info, cluster=Cluster.parse("h100")), tokens))
    said_bytes = {name: 2 * figure.value for name, figure in said.items() if name.startswith("memory: ")}
    inputs, encoder = said_bytes["memory: inputs of the layers"], said_bytes["memory: activations of the encoder"]
    saved = kept_by_training(config, tokens, checkpoint=True)
    around = 4 * (4 * tokens + config.embedding_window) * config.dim  # embedding, those before it, last norm
    assert inputs <= saved <= inputs + 1.4 * encoder + around
    all_layers = config.num_layers * said_bytes["memory: activations of a layer"] + encoder
    assert 0.7 * all_layers <= kept_by_training(config, tokens, checkpoint=False) <= 1.1 * all_layers


@pytest.mark.slow
def test_rows_are_shared_by_devices_only_where_there_are_too_few() -> None:
    many = by_name(training_figures(paper("8b-a1b", "64xh100", 8192)))
    one_row = by_name(training_figures(paper("8b-a1b", "64xh100", 2**24)))
    assert (many["data parallel"].value, many["context parallel"].value) == (64, 1)
    assert (one_row["data parallel"].value, one_row["context parallel"].value) == (1, 64)
    assert one_row["tokens a step"].value == 2**24
    assert many["expert parallel"].value == 8
    assert by_name(training_figures(paper("0.5b")))["expert parallel"].value == 1


@pytest.mark.slow
def test_a_step_is_cut_into_parts_until_it_fits() -> None:
    found = by_name(training_figures(paper("8b-a1b", "16xa100", 8192), 2**24))
    assert found["parts of a step"].value > 1
    assert found["memory a device"].value <= 0.9 * 80e9
    assert found["memory a device"].formula.startswith("fits")
    hopeless = by_name(training_figures(paper("8b-a1b", "h100", 2**24)))
    assert hopeless["memory a device"].formula.startswith("DOES NOT FIT")


@pytest.mark.parametrize(("devices", "nodes"), [("8xh100", 1), ("32xh100", 4)])
def test_what_is_sent_is_counted_by_hand(devices: str, nodes: int) -> None:
    """Each device of a node has an eighth of the experts, and shares them with one device of each other node."""
    found = by_name(training_figures(paper("8b-a1b", devices, 8192), 2**20 * nodes))
    config, info = preset("8b-a1b"), model_info(preset("8b-a1b"))
    experts, parts = 19 * 64 * 3 * config.dim * config.expert_dim, found["parts of a step"].value
    layers = sum(layer.parameters for layer in info.layers) - experts
    travelling = 6 * 2 * (2**20 / 8) * 4 * config.dim * 19 + 2 * 8 * 64 * 19 * parts
    weights = 4 * (2 * layers + 2 * (info.parameters - experts - layers) + layers) * parts
    sums = 2 * (8 * (6 + 8 * nodes + 64 * 19) + 4)
    in_node = (travelling + weights + sums) * 7 / 8
    assert found["links in a node"].value == pytest.approx((in_node) / 450e9)
    from_nodes = (weights + sums + 12 * experts * parts) * (1 - 1 / nodes)
    assert found["network"].value == pytest.approx(from_nodes / (8 * 50e9))
    assert found["sent: all-to-all"].value == pytest.approx(travelling * 7 / 8)


def test_windows_come_from_as_many_parts_as_they_reach() -> None:
    """Of rows of 8,192 tokens cut into 64 parts of 128, the first parts have fewer than 4,095 places before them."""
    one = paper("8b-a1b", "64xh100", 8192)
    config, info = one.config, one.info
    split = Split(rows=1, data_parallel=1, context_parallel=64, expert_parallel=8)
    before = sum(min(128 * part, config.window - 1) for part in range(64))
    layers = sum(spec.mixer == "window" for spec in config.layers)
    windows, memory, *_ = [message for message in messages(one, split) if message.group == 64][2:]
    numbers = 3 * layers * before * 2 * config.num_kv_heads * config.head_dim
    assert windows.sent == pytest.approx(2 * numbers / 64)
    assert memory.bytes == info.memory.chunk_keys + info.memory.chunk_values + info.memory.landmarks


def test_the_way_to_read_chunks_of_others_that_sends_less_is_taken() -> None:
    """Of 64 parts, each picks as often as there are chunks, 64 times over; of 65,536, a sixteenth as often."""
    for devices, taken, left in (("64xh100", "gathered", "picked"), ("65536xh100", "picked", "gathered")):
        one = paper("8b-a1b", devices, 2**24)
        found, memory = by_name(training_figures(one, 2**24)), one.info.memory
        sent = {way: found[f"{way} chunks: sent"] for way in (taken, left)}
        assert sent[taken].value < sent[left].value
        assert sent[taken].formula.startswith("TAKEN")
        assert not sent[left].formula.startswith("TAKEN")
        assert found["memory: chunk memory"].value == found[f"{taken} chunks: memory"].value
        pairs, count = memory.chunk_keys + memory.chunk_values, one.cluster.count
        assert found["gathered chunks: sent"].value == pytest.approx(2 * pairs * (1 - 1 / count))
        assert found["gathered chunks: memory"].value == 2 * (pairs + memory.landmarks)
    distinct = 1 - math.exp(-64 * 64 / count)  # of the chunks, by the last part
    own = pairs * (distinct + 1 / count)
    assert found["picked chunks: memory"].value == pytest.approx(2 * (own + memory.landmarks), rel=1e-3)
    landmarks = 2 * memory.landmarks
    assert found["sent: gather"].value < 12 * one.info.parameters + landmarks


def test_the_longest_names_itself() -> None:
    slow_network = by_name(training_figures(paper("8b-a1b", "1024xh100", 8192)))["time a step"]
    assert slow_network.bound == ("network", "network")
    assert by_name(training_figures(paper("0.5b")))["time a step"].bound == ("compute", "compute")


def test_tokens_a_day_follow_from_the_step() -> None:
    found = by_name(training_figures(paper()))
    step, day, days = (found[name] for name in ("time a step", "tokens a day", "days for 1T tokens"))
    assert day.value == pytest.approx(found["tokens a step"].value * 86400 / step.value)
    assert day.assumed is not None
    assert days.assumed == pytest.approx(1e12 / day.assumed)


def test_decoding_one_text_reads_the_active_weights_and_the_landmarks() -> None:
    one = paper("8b-a1b", "h100", 2**24)
    found = by_name(serving_figures(one))["decode a token of 1 text"]
    memory, config = one.info.memory, one.config
    weights = 2 * (one.info.active_parameters + one.info.embedding_parameters)
    picks = 2 * config.top_k * config.chunk_size * config.memory_head_dim * 2 * 2
    assert found.value == pytest.approx((weights + 2 * memory.landmarks + memory.caches + picks) / 3350e9, rel=1e-3)
    assert found.bound == ("device memory", "device memory")


def test_more_texts_use_more_experts_and_never_more_than_there_are() -> None:
    found = by_name(serving_figures(paper("8b-a1b", "h100", 2**16)))
    one, all_ = (found[f"decode a token of {texts}"].value for texts in ("1 text", "all texts a device"))
    texts = found["texts a device"].value
    assert one < all_ < texts * one


def test_chunks_in_the_host_make_room_for_more_texts() -> None:
    found = by_name(serving_figures(paper("8b-a1b", "h100", 2**24)))
    assert found["texts a device, chunks in the host"].value > 10 * found["texts a device"].value
    assert found["host memory a text"].value == 2**24 * 128 * 2 * 2


def test_no_time_is_given_for_a_text_that_does_not_fit() -> None:
    one = replace(paper(), info=model_info(preset("8b-a1b", "full"), context=2**24))
    found = by_name(serving_figures(one))
    assert found["texts a device"].value == 0
    assert not [name for name in found if name.startswith("decode") or name.startswith("tokens a second")]


def test_prefill_runs_the_lower_half_over_all_and_the_rest_over_the_end() -> None:
    one = paper("8b-a1b", "4xh100", 2**20)
    found = by_name(serving_figures(one))
    tail = 10 * 4095 + 1
    flops = one.info.prefill_flops * 2**20 + (one.info.forward_flops - one.info.prefill_flops) * tail
    assert found["prefill, one device"].value == pytest.approx(flops / 989e12)
    again = one.config.lower_reach + tail + one.config.lower_reach  # before a part, and at the end
    part = one.info.prefill_flops * (2**18 + again) + (one.info.forward_flops - one.info.prefill_flops) * tail
    assert found["prefill, all devices"].value == pytest.approx(part / 989e12)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variant"), combinations(list(PRESETS), VARIANTS))
def test_every_preset_and_variant_has_figures(name: str, variant: str) -> None:
    info = model_info(preset(name, variant), context=4096)
    one = Paper(info=info, cluster=Cluster.parse("8xb200"))
    for figure in [*training_figures(one), *serving_figures(one)]:
        assert math.isfinite(figure.value)
        assert figure.value >= 0
        assert figure.assumed is None or figure.unit != "s" or figure.assumed >= figure.value
        assert figure.formula


def test_a_share_of_the_peak_that_cannot_be_is_refused() -> None:
    right = paper("tiny")
    for mfu in (0, -1, 1.5, float("nan")):
        with pytest.raises(InvalidArgument, match=r"mfu = .* must be more than 0 and at most 1"):
            replace(right, mfu=mfu)
