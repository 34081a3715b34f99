"""`transformers` reads a directory of ours and gives the same numbers."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from small_models import build, one_first, small_config

from hsa_compile.errors import InvalidArgument, MissingDependency
from hsa_compile.model.inference.generate import generate
from hsa_compile.model.pretrained import from_pretrained, save_pretrained

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
hf = pytest.importorskip("hsa_compile.model.hf")
pytestmark = [
    pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

TOKENS = torch.randint(19, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_pretrained(build(small_config("hsa-ultralong")), tmp_path)
    return tmp_path


@pytest.mark.parametrize("variant", one_first("hsa-ultralong"))
def test_auto_classes_read_our_directory(variant: str, tmp_path: Path) -> None:
    ours = build(small_config(variant))
    save_pretrained(ours, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).hsa_config == ours.config.to_dict()
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, ours(TOKENS))


def test_the_loss_is_that_of_the_next_token(directory: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    labels = TOKENS.clone()
    labels[0, :10] = -100
    output = model(TOKENS, labels=labels)
    log_probabilities = output.logits[:, :-1].log_softmax(-1).gather(2, TOKENS[:, 1:, None])[:, :, 0]
    asked = labels[:, 1:] != -100
    torch.testing.assert_close(output.loss, -log_probabilities[asked].mean())
    output.loss.backward()
    assert model.model.embedding.weight.grad is not None
    assert len(model(TOKENS, labels=labels, return_dict=False)) == 2


def test_generate_of_transformers_gives_our_tokens(directory: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    mask = torch.ones_like(TOKENS)
    new = model.generate(TOKENS, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, TOKENS.shape[1] :]
    ours = generate(from_pretrained(directory), TOKENS, max_new_tokens=6, stop=[[0]])  # it ends a document of bytes
    assert any(len(row) < 6 for row in ours)
    assert new.tolist() == [row + [0] * (6 - len(row)) for row in ours]


def test_padding_before_a_text_changes_nothing(directory: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    padded = torch.zeros(2, 24, dtype=torch.int64)
    padded[0, 7:], padded[1] = TOKENS[0, :17], TOKENS[1]
    mask = torch.ones_like(padded)
    mask[0, :7] = 0
    with torch.no_grad():
        logits = model(padded, attention_mask=mask).logits
        torch.testing.assert_close(logits[0, 7:], model(TOKENS[:1, :17]).logits[0])
        torch.testing.assert_close(logits[1], model(TOKENS[1:]).logits[0])


@pytest.mark.parametrize(
    "change",
    [
        {"attention_mask": torch.tensor([[1] * 10 + [0] * 4 + [1] * 10, [1] * 24])},
        {"attention_mask": torch.tensor([[1] * 10 + [2] * 14, [1] * 24])},
        {"attention_mask": torch.ones(2, 25)},
        {"position_ids": torch.arange(24)[None]},
        {"output_attentions": True},
        {"use_cache": True, "labels": TOKENS},
        {"labels": TOKENS, "logits_to_keep": 1},
    ],
    ids=["hole", "packed", "longer", "positions", "attentions", "cache", "loss_of_a_part"],
)
def test_what_forward_cannot_do_is_refused(directory: Path, change: dict[str, object]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    with pytest.raises(InvalidArgument, match=next(reversed(change))):
        model(TOKENS, **change)


def test_what_others_cannot_do_is_refused(directory: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    with pytest.raises(InvalidArgument, match="output_attentions"):
        model.generate(TOKENS, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
    model.config.output_hidden_states = True
    assert len(model(TOKENS).hidden_states) == model.config.num_hidden_layers + 1
    with pytest.raises(InvalidArgument, match="load_in_8bit"):
        type(model).from_pretrained(directory, load_in_8bit=True)
    with pytest.raises(InvalidArgument, match="variant"):
        model.save_pretrained(directory, variant="fp16")


def test_logits_of_some_tokens_are_those_of_all(directory: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    logits = model(TOKENS).logits
    torch.testing.assert_close(model(TOKENS, logits_to_keep=3).logits, logits[:, -3:])
    places = torch.tensor([2, 9])
    torch.testing.assert_close(model(TOKENS, logits_to_keep=places).logits, logits[:, places])
    model.config.return_dict = False
    assert isinstance(model(TOKENS), tuple)


def test_losses_of_parts_add_up_to_that_of_the_batch(directory: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    labels = TOKENS.clone()
    labels[0, :10] = -100
    num_items = (labels[:, 1:] != -100).sum()
    parts = [model(TOKENS[row], labels=labels[row], num_items_in_batch=num_items).loss for row in ([0], [1])]
    torch.testing.assert_close(parts[0] + parts[1], model(TOKENS, labels=labels).loss)
    assert model.accepts_loss_kwargs


def test_a_save_keeps_how_to_generate_and_takes_other_weights(directory: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    model.generation_config.max_new_tokens = 7
    weights = {name: torch.zeros_like(weight) for name, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path / "a", state_dict=weights)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert again.generation_config.max_new_tokens == 7
    assert not any(weight.any() for weight in again.state_dict().values())
    with pytest.raises(InvalidArgument, match="state_dict does not fit"):
        model.save_pretrained(tmp_path / "b", state_dict={"model.embedding.weight": torch.zeros(1)})
    model.save_pretrained(tmp_path / "c", is_main_process=False)
    assert not (tmp_path / "c").exists()


def test_dtype_and_device_are_as_asked(directory: Path) -> None:
    auto = transformers.AutoModelForCausalLM
    assert auto.from_pretrained(directory, dtype="auto").dtype == torch.float32
    for dtype in (torch.bfloat16, "bfloat16"):
        assert auto.from_pretrained(directory, dtype=dtype, device_map={"": "cpu"}).dtype == torch.bfloat16
    for dtype in ("foo", "nn", 16):
        for read in (auto, hf.HSACompileForCausalLM):
            with pytest.raises(InvalidArgument, match=rf"dtype = {dtype!r} is not allowed; weights are .* or auto"):
                read.from_pretrained(directory, dtype=dtype)
    for place in ("balanced", {"model.lower": "cpu", "model.upper": "cpu"}, {"model": "cpu"}, {}, 1.5):
        with pytest.raises(InvalidArgument, match=r"device_map = .* is not allowed; it is a device, auto"):
            hf.HSACompileForCausalLM.from_pretrained(directory, device_map=place)


def test_what_transformers_saves_we_read(directory: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    model.save_pretrained(tmp_path / "again")
    again = from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(TOKENS), model(TOKENS).logits)


def test_bytes_are_tokens(tmp_path: Path) -> None:
    save_pretrained(build(small_config("swa", vocab_size=256)), tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("plain text, é€😀", " two  spaces \n", ""):
        assert tokenizer(text)["input_ids"] == list(text.encode())
        assert tokenizer.decode(list(text.encode())) == text
    padded = tokenizer(["a", "abc"], padding=True, return_tensors="pt")
    assert padded["input_ids"].tolist() == [[0, 0, 97], [97, 98, 99]]
    assert padded["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "hsa_compile.model.hf")
    with pytest.raises(MissingDependency, match=r"pip install 'hsa-compile\[hf\]'"):
        importlib.import_module("hsa_compile.model.hf")
