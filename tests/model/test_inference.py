"""Reading in pieces, decoding and the fast prefill give the logits of one shot, for the whole family."""

from collections.abc import Callable

import pytest
import torch
from small_models import build, combinations, one_first, small_config
from torch import Tensor

from hsa_compile.errors import InvalidArgument
from hsa_compile.kernels.worker_pool import run_on_workers
from hsa_compile.model import transformer
from hsa_compile.model.config import VARIANTS
from hsa_compile.model.inference.inference import ModelState, extend, new_state, prefill, upper_reach
from hsa_compile.model.transformer import HSATransformer
from hsa_compile.target import this_cpu

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")

TOLERANCE = 1e-4


def texts(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(19, (batch, length), generator=torch.Generator().manual_seed(seed))


def read_in_pieces(model: HSATransformer, tokens: Tensor, state: ModelState, size: int) -> Tensor:
    return torch.cat([extend(model, piece, state) for piece in tokens.split(size, dim=1)], dim=1)


@pytest.mark.parametrize(("variant", "size"), combinations(VARIANTS, [7, 30, 1, 1000]))
def test_pieces_then_tokens_give_the_logits_of_one_shot(variant: str, size: int) -> None:
    model = build(small_config(variant))
    tokens = texts(2, 58)
    with torch.no_grad():
        whole = model(tokens)
    state = new_state(model, batch=2)
    read = read_in_pieces(model, tokens[:, :50], state, size)
    decoded = read_in_pieces(model, tokens[:, 50:], state, 1)
    torch.testing.assert_close(torch.cat((read, decoded), dim=1), whole, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_kernels_in_cpp_give_the_logits_of_pytorch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(small_config("hsa-ultralong"))
    tokens = texts(1, 33)
    read = read_in_pieces(model, tokens[:, :30], new_state(model), 30)
    state = new_state(model)
    built = torch.cat(
        (prefill(model, tokens[:, :30], state)[:, None], read_in_pieces(model, tokens[:, 30:], state, 1)), 1
    )
    monkeypatch.setenv("CXX", "there-is-no-such-compiler")
    this_cpu.cache_clear()
    with torch.no_grad():
        whole = model(tokens)
    this_cpu.cache_clear()
    torch.testing.assert_close(read, whole[:, :30], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(built, whole[:, 29:], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("variant", ["hsa-ultralong", "ramba"])
def test_a_softmax_off_by_one_is_that_of_training_and_of_decoding(variant: str) -> None:
    tokens = texts(1, 41)
    model, without = (build(small_config(variant, softmax_off_by_one=chosen)) for chosen in (True, False))
    with torch.no_grad():
        whole, other = model(tokens), without(tokens)
    decoded = read_in_pieces(model, tokens, new_state(model), 1)
    torch.testing.assert_close(decoded, whole, rtol=0, atol=TOLERANCE)
    assert (whole - other).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("variant", one_first("hsa-ultralong"))
def test_parts_that_threads_read_side_by_side_are_exact(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(small_config(variant))
    split = []

    def counting(task: Callable[[int, int], object], count: int) -> list[tuple[int, int, object]]:
        split.append(count)
        return run_on_workers(task, count)

    monkeypatch.setattr(transformer, "PART", 100)
    monkeypatch.setattr(transformer, "run_on_workers", counting)
    tokens = texts(2 if variant != "drt" else 1, 650)
    with torch.no_grad():
        whole = model(tokens)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        state = new_state(model, batch=len(tokens))
        prefill(model, tokens[:, :333], state)  # 333 is neither whole parts nor whole chunks
        last = prefill(model, tokens[:, 333:640], state)
    finally:
        torch.set_num_threads(before)
    assert split or variant in ("full", "ramba")
    torch.testing.assert_close(last, whole[:, 639], rtol=0, atol=TOLERANCE)
    decoded = read_in_pieces(model, tokens[:, 640:], state, 1)
    torch.testing.assert_close(decoded, whole[:, 640:], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("variant", "length"), combinations(VARIANTS, [61, 30, 5, 29, 31, 1, 4, 6]))
def test_fast_prefill_is_the_full_forward_at_the_last_token(variant: str, length: int) -> None:
    model = build(small_config(variant))
    tokens = texts(2, length + 9)
    with torch.no_grad():
        whole = model(tokens)
    state = new_state(model, batch=2)
    last = prefill(model, tokens[:, :length], state, piece=16)
    torch.testing.assert_close(last, whole[:, length - 1], rtol=0, atol=TOLERANCE)
    decoded = read_in_pieces(model, tokens[:, length:], state, 1)
    torch.testing.assert_close(decoded, whole[:, length:], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("variant", "parts"), combinations(VARIANTS, [(60, 50), (3, 2), (60, 2), (3, 50)]))
def test_prefill_goes_on_where_an_earlier_one_ended(variant: str, parts: tuple[int, int]) -> None:
    model = build(small_config(variant))
    first, second = parts
    tokens = texts(1, first + second + 4)
    with torch.no_grad():
        whole = model(tokens)
    state = new_state(model)
    prefill(model, tokens[:, :first], state, piece=11)
    last = prefill(model, tokens[:, first : first + second], state, piece=11)
    torch.testing.assert_close(last, whole[:, first + second - 1], rtol=0, atol=TOLERANCE)
    decoded = read_in_pieces(model, tokens[:, first + second :], state, 1)
    torch.testing.assert_close(decoded, whole[:, first + second :], rtol=0, atol=TOLERANCE)


def test_rows_of_unequal_length_are_as_if_alone(variant: str) -> None:
    model = build(small_config(variant))
    lengths = [41, 1, 34, 5]
    more = 6
    tokens = [texts(1, n + more, seed=n) for n in lengths]
    padded = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for b, (row, n) in enumerate(zip(tokens, lengths, strict=True)):
        padded[b, :n] = row[0, :n]
    with torch.no_grad():
        alone = [model(row)[0] for row in tokens]
    state = new_state(model, batch=len(lengths))
    last = prefill(model, padded, state, lengths, piece=16)
    for b, n in enumerate(lengths):
        torch.testing.assert_close(last[b], alone[b][n - 1], rtol=0, atol=TOLERANCE)
    for step in range(more):
        new = torch.cat([row[:, n + step : n + step + 1] for row, n in zip(tokens, lengths, strict=True)])
        logits = extend(model, new, state)
        for b, n in enumerate(lengths):
            torch.testing.assert_close(logits[b, 0], alone[b][n + step], rtol=0, atol=TOLERANCE)


def test_rows_that_rest_while_others_go_on(variant: str) -> None:
    model = build(small_config(variant))
    tokens = texts(2, 40)
    with torch.no_grad():
        whole = model(tokens)
    state = new_state(model, batch=2)
    done = [0, 0]
    for counts in ([3, 11], [0, 9], [12, 0], [6, 6], [1, 0], [18, 14]):
        piece = torch.zeros(2, max(counts), dtype=torch.int64)
        for b, n in enumerate(counts):
            piece[b, :n] = tokens[b, done[b] : done[b] + n]
        logits = extend(model, piece, state, counts)
        for b, n in enumerate(counts):
            torch.testing.assert_close(logits[b, :n], whole[b, done[b] : done[b] + n], rtol=0, atol=TOLERANCE)
            done[b] += n
    assert done == [40, 40]


@pytest.mark.parametrize("placement", ["host", "disk"])
def test_where_the_memory_lies_changes_nothing(placement: str, tmp_path) -> None:
    model = build(small_config("hsa-ultralong"))
    tokens = texts(2, 70)
    with torch.no_grad():
        whole = model(tokens)
    state = new_state(model, batch=2, memory=placement, directory=tmp_path)
    torch.testing.assert_close(read_in_pieces(model, tokens, state, 13), whole, rtol=0, atol=TOLERANCE)


def test_the_upper_half_runs_over_the_tail_alone() -> None:
    model = build(small_config("hsa-ultralong"))
    reach = upper_reach(model)
    assert reach == 4 * 6 + 1
    seen = []
    model.upper[0].register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0].shape[1]))
    prefill(model, texts(1, 500), new_state(model), piece=64)
    assert seen == [reach]


def test_positions_beyond_sixteen_million_are_as_good_as_the_first() -> None:
    model = build(small_config("swa"))
    tokens = texts(1, 40)
    logits = []
    for start in (0, 2**24):
        state = new_state(model)
        state.positions, state.num_upper_past = [start], [0]
        state.lower = model.empty_caches(model.lower, 1)
        x = model.embed(tokens)
        with torch.no_grad():
            out, _ = model.run(model.lower, x, model.piece([start], x))
        logits.append(out)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=TOLERANCE)


def test_bad_input_is_named() -> None:
    model = build(small_config("hsa-ultralong"))
    state = new_state(model, batch=2)
    with pytest.raises(InvalidArgument, match=r"\[3, 4\].*\[2, T\]"):
        extend(model, texts(3, 4), state)
    with pytest.raises(InvalidArgument, match=r"num_valid = \[5, 1\].*0 … 4"):
        extend(model, texts(2, 4), state, [5, 1])
    with pytest.raises(InvalidArgument, match=r"lengths = \[4, 0\]"):
        prefill(model, texts(2, 4), state, [4, 0])
    with pytest.raises(InvalidArgument, match="float32"):
        extend(model, torch.zeros(2, 4), state)
    with pytest.raises(InvalidArgument, match="batch = 0"):
        new_state(model, batch=0)
