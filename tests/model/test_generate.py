"""Generation is the arg-max of the full forward, row by row; sampling follows its seed; readings are kept."""

import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import build, combinations, one_first, small_config

from hsa_compile.errors import HSACompileError, InvalidArgument, NotFinite, SaveError
from hsa_compile.files import read_summed_json, write_summed_json
from hsa_compile.model.config import VARIANTS
from hsa_compile.model.data.tokenizer import BytesTokenizer
from hsa_compile.model.inference.generate import Sampling, TextStream, draw, generate, stream
from hsa_compile.model.inference.inference import extend, new_state, prefill
from hsa_compile.model.inference.reading import fingerprint, load_state, save_state
from hsa_compile.model.presets import preset
from hsa_compile.model.transformer import HSATransformer

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")


def text(length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(19, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def by_full_forward(model: HSATransformer, prompt: torch.Tensor, count: int) -> list[int]:
    tokens = prompt.tolist()
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_is_the_most_likely_token_of_the_full_forward(variant: str) -> None:
    model = build(small_config(variant))
    prompt = text(43)
    assert generate(model, prompt, max_new_tokens=6) == [by_full_forward(model, prompt, 6)]


@pytest.mark.parametrize("variant", one_first("hsa-ultralong"))
def test_rows_of_a_batch_are_as_if_alone(variant: str) -> None:
    model = build(small_config(variant))
    lengths = [22, 4, 17]
    prompt = torch.zeros(3, 22, dtype=torch.int64)
    for b, length in enumerate(lengths):
        prompt[b, :length] = text(length, seed=b)
    for temperature in (0.0, 1.0):
        options = {"max_new_tokens": 5, "temperature": temperature, "top_p": 0.9}
        alone = [generate(model, prompt[b, :length], seed=5 + b, **options)[0] for b, length in enumerate(lengths)]
        # A row that ends early must not disturb the others.
        stop = [alone[0][2:4]]
        together = generate(model, prompt, lengths, seed=5, stop=stop, **options)
        ended = [next((i for i in range(2, 6) if row[i - 2 : i] == stop[0]), None) for row in alone]
        expected = [row if end is None else row[: end - 2] for row, end in zip(alone, ended, strict=True)]
        assert together == expected
        assert len(together[0]) <= 2


def test_of_stop_sequences_that_end_together_the_longest_is_left_out() -> None:
    model, prompt = build(small_config("swa")), text(12)
    options = {"max_new_tokens": 6, "temperature": 1.5, "seed": 3}
    free = generate(model, prompt, **options)[0]
    assert generate(model, prompt, stop=[free[2:4], free[1:4], free[3:5]], **options) == [free[:1]]


def test_sampling_repeats_with_its_seed_and_only_then() -> None:
    model, prompt = build(small_config("swa")), text(12)
    drawn = [generate(model, prompt, max_new_tokens=30, temperature=1.5, seed=seed) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.1, 0.5, 0.15, 0.25])
    logits = (probabilities.log() * 2).expand(1000, 4)
    grid = torch.arange(1000, dtype=torch.float64) / 1000
    counts = torch.bincount(draw(logits, grid, 2.0, 1.0), minlength=4)
    torch.testing.assert_close(counts / 1000, probabilities, rtol=0, atol=0.002)
    counts = torch.bincount(draw(logits, grid, 2.0, 0.7), minlength=4)
    torch.testing.assert_close(counts / 1000, torch.tensor([0, 2 / 3, 0, 1 / 3]), rtol=0, atol=0.002)
    assert set(draw(logits, grid, 2.0, 1e-9).tolist()) == {1}


def test_a_draw_never_takes_what_is_impossible() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]]).expand(3, 4)
    assert set(draw(logits, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), 1.0, 1.0).tolist()) == {0, 2}


def test_tokens_are_handed_out_as_they_come() -> None:
    model, seen = build(small_config("drt")), []
    prompt = torch.stack((text(9), text(9, seed=2)))
    new = generate(model, prompt, max_new_tokens=5, on_token=lambda row, token: seen.append((row, token)))
    assert [[token for row, token in seen if row == b] for b in range(2)] == new
    assert [row for row, _ in seen] == [0, 1] * 5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_end_the_text(value: float) -> None:
    model = build(small_config("swa"))
    with torch.no_grad():
        model.norm.weight.fill_(value)
    with pytest.raises(NotFinite, match="the logits of new token 0 of text 0 hold"):
        generate(model, text(9), max_new_tokens=2)


def test_no_new_tokens_is_reading_alone() -> None:
    model = build(small_config("hsa-ultralong"))
    state = new_state(model)
    assert generate(model, text(21), max_new_tokens=0, state=state) == [[]]
    assert state.positions == [21]


def test_training_mode_is_left_alone_and_does_no_harm() -> None:
    model, prompt = build(small_config("hsa-ultralong")), text(33)
    expected = generate(model, prompt, max_new_tokens=4)
    model.train()
    model.checkpoint_activations = True
    assert generate(model, prompt, max_new_tokens=4) == expected
    assert model.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1.0}, "temperature = -1"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"seed": -1}, "seed = -1"),
        ({"max_new_tokens": -1}, "max_new_tokens = -1"),
        ({"stop": [[]]}, "empty sequence"),
        ({"prompt": torch.tensor([19])}, "token 19; allowed are 0 … 18"),
        ({"prompt": torch.tensor([-1])}, "token -1"),
        ({"prompt": torch.zeros(1, 0, dtype=torch.int64)}, r"\[1, 0\].*one token"),
        ({"lengths": [0]}, r"lengths = \[0\]"),
    ],
)
def test_bad_values_are_named(change: dict[str, object], message: str) -> None:
    options = {"prompt": text(5), "max_new_tokens": 1, **change}
    with pytest.raises(InvalidArgument, match=message):
        generate(build(small_config("swa")), **options)


# --- text


def shown(tokens: Iterable[int], stop: tuple[str, ...] = ()) -> list[str]:
    feed = TextStream(BytesTokenizer(), stop)
    return [*(feed.feed(token) for token in tokens), feed.finish()]


def test_characters_are_shown_whole() -> None:
    assert shown("aé€😀".encode()) == ["a", "", "é", "", "", "€", "", "", "", "😀", ""]
    assert "".join(shown(b"a\xffb\xe2\x82")) == "a\ufffdb\ufffd"
    # A model may have more tokens than there are bytes.
    assert "".join(shown([*b"a\xe2\x82", 256, *b"b", 50_000])) == "a\ufffd\ufffdb\ufffd"


def test_nothing_of_a_stop_string_is_shown() -> None:
    assert "".join(shown(b"one\n\ntwo", ("\n\n",))) == "one"
    assert shown(b"a\nb", ("\n\n",)) == ["a", "", "\nb", ""]
    assert "".join(shown(b"ababac and", ("abac",))) == "ab"
    assert "".join(shown(b"end\n", ("\n\n",))) == "end\n"
    with pytest.raises(InvalidArgument, match="empty string"):
        TextStream(BytesTokenizer(), ("",))


def test_tokens_that_split_characters_and_words_make_the_same_text() -> None:
    class Pairs:
        """Two bytes a token; a text that begins anew loses its first space, as SentencePiece's do."""

        name, pieces = "pairs", [b" \xe2", b"\x82\xac", b" b", b"cd", b"\xff "]

        def decode(self, tokens: list[int]) -> str:
            return b"".join(self.pieces[token] for token in tokens).decode(errors="replace").removeprefix(" ")

    for tokens in ([0, 1, 2, 3], [3, 2, 2, 0, 1], [4, 3, 3]):
        feed = TextStream(Pairs())
        assert "".join([*(feed.feed(token) for token in tokens), feed.finish()]) == Pairs().decode(tokens)


# --- what was read


@pytest.mark.parametrize(("variant", "placement"), combinations(VARIANTS, ["device", "host", "disk"]))
def test_a_reading_comes_back_and_goes_on(variant: str, placement: str, tmp_path: Path) -> None:
    model = build(small_config(variant))
    book, more = torch.stack((text(57), text(57, seed=2))), torch.stack((text(9, seed=3), text(9, seed=4)))
    state = new_state(model, batch=2)
    prefill(model, book, state, [57, 41], piece=16)
    save_state(model, state, tmp_path / "book")
    expected = extend(model, more, state)
    for _ in range(2):  # it is asked many times
        again = load_state(model, tmp_path / "book", memory=placement)
        torch.testing.assert_close(extend(model, more, again), expected, rtol=0, atol=1e-6)


def test_a_new_reading_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    model = build(small_config("hsa-ultralong"))
    state = new_state(model)
    for length in (11, 12):
        prefill(model, text(length)[None], state)
        save_state(model, state, tmp_path)
    assert load_state(model, tmp_path).positions == [23]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_reading_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(small_config("hsa-ultralong"))
    state = new_state(model)
    prefill(model, text(11)[None], state)
    save_state(model, state, tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    prefill(model, text(11)[None], state)
    for where in ("hsa_compile.model.memory.memory.ChunkMemory.save", "hsa_compile.model.tensor_files.save_file"):
        with monkeypatch.context() as patch:
            patch.setattr(where, full)
            with pytest.raises(SaveError, match="No space left"):
                save_state(model, state, tmp_path)
    assert load_state(model, tmp_path).positions == [11]
    assert len(list(tmp_path.iterdir())) == 2


def test_what_another_model_has_read_is_refused(tmp_path: Path) -> None:
    model = build(small_config("hsa-ultralong"))
    state = new_state(model)
    prefill(model, text(11)[None], state)
    save_state(model, state, tmp_path)
    for other in (build(model.config, seed=1), build(model.config, dtype=torch.float64)):
        with pytest.raises(SaveError, match=r"reading\.json was read by another model: the same config"):
            load_state(other, tmp_path)
    with pytest.raises(SaveError, match="another model: top_k of its config differ"):
        load_state(build(small_config("hsa-ultralong", top_k=2)), tmp_path)
    assert fingerprint(model) == fingerprint(build(model.config))


def test_damaged_and_foreign_readings_are_refused_by_name(tmp_path: Path) -> None:
    model = build(small_config("hsa-ultralong"))
    state = new_state(model)
    prefill(model, text(30)[None], state)
    save_state(model, state, tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"reading.json", "caches.safetensors"}
    for path in files:
        whole = path.read_bytes()
        for left in (whole[:-5], b"{}"):
            path.write_bytes(left)
            with pytest.raises(HSACompileError, match=path.name):
                load_state(model, tmp_path)
        path.write_bytes(whole)
    load_state(model, tmp_path)
    with pytest.raises(SaveError, match=r"reading\.json cannot be read"):
        load_state(model, tmp_path / "nowhere")


def test_a_flipped_bit_in_any_file_of_a_reading_is_found_and_its_file_named(tmp_path: Path) -> None:
    model = build(small_config("hsa-ultralong"))
    state = new_state(model)
    prefill(model, text(30)[None], state)
    save_state(model, state, tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 4
    for path in files:
        whole = path.read_bytes()
        for place in range(3, len(whole), len(whole) // 7):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :])
            with pytest.raises(HSACompileError, match=path.name):
                load_state(model, tmp_path)
        path.write_bytes(whole)
    load_state(model, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"place": "../elsewhere"}, "place = '../elsewhere' must be reading- and 32 hexadecimal digits"),
        ({"place": 3}, "place = 3 must be a str"),
        ({"rows": []}, "rows must be a list of objects"),
        ({"rows": [[]]}, "rows must be a list of objects"),
        ({"rows": [{"positions": [30], "num_upper_past": [30.5], "carried": []}]}, "num_upper_past = 30.5 must be"),
        ({"rows": [{"positions": [30], "num_upper_past": [], "carried": []}]}, "contradicts itself"),
        ({"rows": [{"positions": [31], "num_upper_past": [31], "carried": []}]}, None),
        ({"rows": [{"positions": [36], "num_upper_past": [36], "carried": []}]}, "says that .36. tokens were read"),
        ({"rows": [{"positions": [30] * 2, "num_upper_past": [30] * 2, "carried": []}]}, "does not belong to reading"),
        ({"rows": [{"positions": [30], "num_upper_past": [30], "carried": [7]}]}, "it lacks 'carried.7.indices'"),
        ({"by_rows": "no"}, "by_rows = 'no' must be a bool"),
        ({"config": {}}, "another model: variant, "),
        ({"format_version": 1}, "version 1; this hsa-compile reads"),
    ],
)  # fmt: skip
def test_a_reading_whose_index_is_forged_is_refused(
    change: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    model = build(small_config("hsa-ultralong"))
    state = new_state(model)
    prefill(model, text(30)[None], state)
    save_state(model, state, tmp_path)
    write_summed_json(tmp_path / "reading.json", {**read_summed_json(tmp_path / "reading.json"), **change})
    if message is None:  # as many chunks were complete
        assert load_state(model, tmp_path).positions == [31]
    else:
        with pytest.raises(SaveError, match=message):
            load_state(model, tmp_path)


def test_the_caller_may_end_a_row() -> None:
    model, going = build(small_config("swa")), [True, True]
    prompt = torch.stack((text(9), text(9, seed=2)))
    seen = []
    for tokens in stream(model, prompt, max_new_tokens=4, sampling=Sampling(), going=going):
        seen.append([token is not None for token in tokens])
        going[1] = False
    assert seen == [[True, True], [True, False], [True, False], [True, False]]


READER = """
import sys, torch, warnings
warnings.simplefilter("ignore")
from hsa_compile.model.inference.inference import new_state, prefill
from hsa_compile.model.presets import preset
from hsa_compile.model.presets import preset
from hsa_compile.model.inference.reading import save_state
from hsa_compile.model.transformer import HSATransformer
torch.manual_seed(0)
model = HSATransformer(preset("tiny")).eval()
state = new_state(model)
tokens = torch.zeros(1, 100, dtype=torch.uint8)
prefill(model, tokens, state)
save_state(model, state, sys.argv[1])
print("ready", flush=True)
while True:
    prefill(model, tokens, state)
    save_state(model, state, sys.argv[1])
"""


@pytest.mark.exhaustive
def test_a_kill_at_any_moment_leaves_a_whole_reading(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = HSATransformer(preset("tiny")).eval()
    for attempt in range(5):
        with subprocess.Popen([sys.executable, "-c", READER, str(tmp_path)], stdout=subprocess.PIPE) as reader:
            assert reader.stdout is not None
            assert reader.stdout.readline() == b"ready\n"
            time.sleep(0.05 + 0.0317 * attempt)
            reader.send_signal(signal.SIGKILL)
        state = load_state(model, tmp_path)
        assert state.positions[0] % 100 == 0
        assert state.memory is not None
        assert state.memory.num_chunks == [state.positions[0] // model.config.chunk_size]
