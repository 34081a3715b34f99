"""A directory of ours at home in Hugging Face: fresh processes, the Hub's layout, and `Trainer`."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import build, small_config

from hsa_compile.errors import InvalidArgument, SaveError
from hsa_compile.files import write_json
from hsa_compile.model.data.tokenizer import load_tokenizer
from hsa_compile.model.evaluation.outcomes import OutcomeFile
from hsa_compile.model.evaluation.subject import Subject
from hsa_compile.model.pretrained import from_pretrained, read_extra, read_tokenizer, save_pretrained
from hsa_compile.model.tensor_files import read_tensors
from hsa_compile.model.training.config import TrainConfig
from hsa_compile.model.training.feed import StepBatch, StepPlan
from hsa_compile.model.training.optimizer import make_optimizer
from hsa_compile.model.training.processes import Processes
from hsa_compile.model.training.step import LossModel, run_step

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
hf = pytest.importorskip("hsa_compile.model.hf")
pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")

FRESH = """
import sys
IMPORT
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline
trust = {} if "hsa_compile.model.hf" in sys.modules else {"trust_remote_code": True}
if trust:
    try:
        AutoConfig.from_pretrained("model", trust_remote_code=False)
    except ValueError as error:
        print("refused:", "trust_remote_code=True" in str(error))
print(AutoConfig.from_pretrained("model", **trust).hsa_config["variant"])
tokenizer = AutoTokenizer.from_pretrained("model", **trust)
model = AutoModelForCausalLM.from_pretrained("model", **trust)
prompts = tokenizer(["a", "longer"], padding=True, return_tensors="pt")
print(model.generate(**prompts, max_new_tokens=3, do_sample=False).shape)
model.save_pretrained("again")
tokenizer.save_pretrained("again")
model.config.save_pretrained("config")
print(len(pipeline("text-generation", "again", **trust)("a", max_new_tokens=2)))
"""


def wrapped(**changes: Any) -> Any:
    return hf.HSACompileForCausalLM.of(build(small_config("hsa-ultralong", vocab_size=256, **changes)))


@pytest.mark.parametrize(
    "imported", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["trust_remote_code", "import"]
)
def test_auto_classes_work_in_a_fresh_process(imported: bool, tmp_path: Path) -> None:
    save_pretrained(build(small_config("hsa-ultralong", vocab_size=256)), tmp_path / "model")
    script = FRESH.replace("IMPORT", "import hsa_compile.model.hf" if imported else "")
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "CXX": "there-is-none",
        "PYTHONPATH": os.pathsep.join([str(Path(hf.__file__).parents[3]), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    said = ["hsa-ultralong", "torch.Size([2, 9])", "1"]
    assert done.stdout.splitlines() == (said if imported else ["refused: True", *said])
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert "modeling_hsa_compile.py" in names
    assert not names & {"model.py", "folder.py"}, "our own source is not copied"


def test_a_save_has_all_that_the_hub_asks_for(tmp_path: Path) -> None:
    model = wrapped()
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "small")
    assert {path.name for path in (tmp_path / "small").iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_hsa_compile.py",
        "tokenizer_config.json",
    }  # fmt: skip
    card = (tmp_path / "small" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert 'from_pretrained("small", trust_remote_code=True)' in card
    assert "Evaluation" not in card
    (tmp_path / "small" / "README.md").write_text("mine")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small").save_pretrained(tmp_path / "small")
    assert (tmp_path / "small" / "README.md").read_text() == "mine"


def test_the_card_has_the_table_of_the_evaluation(tmp_path: Path) -> None:
    wrapped().save_pretrained(tmp_path / "a")
    cell = {"task": "s-niah", "haystack": "noise", "protocol": "greedy", "length": 4096, "samples": 50,
            "accuracy": 0.96, "low": 0.865, "high": 0.989}  # fmt: skip
    perplexity = {"source": "stdlib", "length": 1024, "perplexity": 5.4321, "num_texts": 8}
    results = {"retrieval": [cell | {"depth": 0.5}, cell | {"depth": None}], "perplexity": [perplexity]}
    (tmp_path / "a" / "evaluation").mkdir()
    write_json(tmp_path / "a" / "evaluation" / "results.json", results)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    table = (tmp_path / "b" / "README.md").read_text().partition("## Evaluation\n\n")[2].splitlines()
    assert table[2:] == [
        "| s-niah | noise | greedy | 4,096 | 96.0 % | 86.5 – 98.9 % | 50 |",
        "| ppl | stdlib | | 1,024 | 5.432 | | 8 |",
    ]
    write_json(tmp_path / "a" / "evaluation" / "results.json", {"retrieval": [{}]})
    with pytest.raises(SaveError, match="holds no results of `hsa-compile eval`"):
        model.save_pretrained(tmp_path / "c")


def save_words(directory: Path, *names: str) -> None:
    """A model whose tokens are words, the last one for those that are unknown."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {name: number for number, name in enumerate(names)}
    written = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=names[-1]))
    written.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    save_pretrained(build(small_config("swa")), directory, tokenizer="words.json")
    written.save(str(directory / "words.json"))


@pytest.mark.parametrize("source", ["stays", "goes"])
def test_a_tokenizer_file_goes_along(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_words(tmp_path / "a", "a", "b", "</s>", "?")
    monkeypatch.chdir(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained("a")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    if source == "goes":
        (tmp_path / "a").rename(tmp_path / "moved")
    model.save_pretrained("b")
    assert read_tokenizer("b") == "tokenizer.json"
    assert load_tokenizer(Path("b", "tokenizer.json")).encode("b a c").tolist() == [1, 0, 3]
    again = transformers.AutoModelForCausalLM.from_pretrained("b")
    for found in (model, again):
        assert (found.generation_config.eos_token_id, found.generation_config.pad_token_id) == (2, 2)


def test_the_tokenizer_of_a_file_pads_and_ends_with_its_end_of_a_document(tmp_path: Path) -> None:
    save_words(tmp_path / "native", "a", "b", "</s>", "?")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "native").save_pretrained(tmp_path / "hub")
    for name in ("native", "hub"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer(["b a c", "a"], padding=True)["input_ids"] == [[1, 0, 3], [2, 2, 0]]
        assert (tokenizer.eos_token_id, tokenizer.decode([1, 0])) == (2, "b a")
    others = transformers.AutoTokenizer.from_pretrained(tmp_path / "native", padding_side="right")
    assert others(["b a c", "a"], padding=True)["input_ids"] == [[1, 0, 3], [0, 2, 2]]


def test_a_file_without_an_end_of_documents_has_none(tmp_path: Path) -> None:
    save_words(tmp_path / "a", "a", "b", "?")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert model.generation_config.eos_token_id is None
    model.save_pretrained(tmp_path / "b")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    assert (tokenizer("b a c")["input_ids"], tokenizer.eos_token, tokenizer.pad_token) == ([1, 0, 2], None, None)


def test_a_tokenizer_that_is_not_there_is_refused_and_not_guessed(tmp_path: Path) -> None:
    save_words(tmp_path / "a", "a", "b", "?")
    (tmp_path / "a" / "words.json").unlink()
    for read in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        with pytest.raises(InvalidArgument, match=r"words\.json: No such file or directory; allowed are bytes and"):
            read.from_pretrained(tmp_path / "a")
    sizes = small_config("swa").to_dict()
    with pytest.raises(InvalidArgument, match=r"tokenizer = '\.\./t\.json' must be bytes or the name of a file"):
        hf.HSACompileConfig(hsa_config=sizes, tokenizer="../t.json")
    with pytest.raises(SaveError, match=r"runs/a/b is no directory, and the Hub does not give its t\.json: "):
        hf.HSACompileForCausalLM(hf.HSACompileConfig(sizes, "t.json", name_or_path="runs/a/b"))


def test_a_new_model_of_a_config_has_its_tokenizer_and_no_training(tmp_path: Path) -> None:
    save_words(tmp_path / "a", "a", "b", "?")
    new = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path / "a"))
    new.save_pretrained(tmp_path / "b")
    assert read_tokenizer(tmp_path / "b") == "tokenizer.json"
    (tmp_path / "words").mkdir()
    (tmp_path / "a" / "words.json").rename(tmp_path / "words" / "words.json")
    sizes = small_config("swa").to_dict()
    new = hf.HSACompileForCausalLM(hf.HSACompileConfig(sizes, "words.json", name_or_path=str(tmp_path / "words")))
    new.save_pretrained(tmp_path / "e")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "e")("b a c")["input_ids"] == [1, 0, 2]
    save_pretrained(wrapped().model, tmp_path / "c", extra={"training": {"step": 7}})
    new = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path / "c"))
    new.save_pretrained(tmp_path / "d")
    assert read_extra(tmp_path / "d") == {}


def test_a_save_keeps_what_the_model_was_trained_on(tmp_path: Path) -> None:
    training = {"training": {"step": 7, "config": {"data": {"corpus": "stdlib"}}}}
    save_pretrained(wrapped().model, tmp_path / "a", extra=training)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    for name in ("b", "a"):  # also in the place where it was
        model.save_pretrained(tmp_path / name)
        assert read_extra(tmp_path / name) == training
    copy.deepcopy(model).save_pretrained(tmp_path / "c", state_dict=model.state_dict())  # as Trainer does
    assert read_extra(tmp_path / "c") == training


def test_generation_ends_with_a_document_unless_something_else_is_said(tmp_path: Path) -> None:
    model = wrapped()
    assert model.generation_config.eos_token_id == 0
    model.generation_config.eos_token_id = [3, 10]
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (again.generation_config.eos_token_id, again.generation_config.pad_token_id) == ([3, 10], 0)
    (tmp_path / "generation_config.json").unlink()
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == 0


@pytest.mark.parametrize("has_card", [False, True])
def test_a_push_uploads_the_folder_and_keeps_a_card(has_card: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: dict[str, Any] = {}

    def upload_folder(folder_path: Path, **options: Any) -> str:
        uploaded.update(options, names={path.name for path in folder_path.iterdir()})
        return "https://commit"

    hub = SimpleNamespace(
        create_repo=lambda repo_id, **_: SimpleNamespace(repo_id=f"me/{repo_id}"),
        file_exists=lambda *_, **__: has_card,
        upload_folder=upload_folder,
    )
    monkeypatch.setattr("huggingface_hub.HfApi", lambda token: hub)
    assert wrapped().push_to_hub("small", commit_message="First") == "https://commit"
    assert {"model.safetensors", "README.md", "modeling_hsa_compile.py"} <= uploaded["names"]
    assert (uploaded["repo_id"], uploaded["commit_message"]) == ("me/small", "First")
    assert uploaded["ignore_patterns"] == (["README.md"] if has_card else None)
    with pytest.raises(InvalidArgument, match="push_to_hub of this model does not take tags"):
        wrapped().push_to_hub("small", tags=["a"])


def test_a_model_of_the_hub_is_fetched_into_its_cache_of_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped().save_pretrained(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = hf.HSACompileForCausalLM.from_pretrained("me/small", revision="v1", trust_remote_code=True)
    assert asked == {"name": "me/small", "revision": "v1"}
    assert torch.equal(model.model.embedding.weight, wrapped().model.embedding.weight)


def test_what_is_neither_a_directory_nor_on_the_hub_is_named(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match=r"runs/none is no directory, and the Hub does not give it: "):
        hf.HSACompileForCausalLM.from_pretrained("runs/none", local_files_only=True, cache_dir=tmp_path)
    with pytest.raises(SaveError, match=r"runs/a/b is no directory, and the Hub does not give it: "):
        hf.HSACompileForCausalLM.from_pretrained("runs/a/b")


def test_checkpointing_changes_no_gradient_and_its_options_are_refused() -> None:
    tokens = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(0))
    model = wrapped(selection_noise=False).train()
    gradients = []
    for enable in (False, True):
        if enable:
            model.activation_checkpointing_enable()
        assert model.gradient_checkpointing is model.model.checkpoint_activations is enable
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]))
    torch.testing.assert_close(*gradients)
    for options in ({"every_n_layers": 2}, {"activation_checkpointing_kwargs": {"use_reentrant": True}}):
        with pytest.raises(InvalidArgument, match="this model checkpoints every layer"):
            model.activation_checkpointing_enable(**options)
    model.activation_checkpointing_disable()
    assert not model.gradient_checkpointing


@pytest.mark.parametrize("variant", ["hsa-ultralong", pytest.param("drt", marks=pytest.mark.exhaustive)])
def test_hidden_states_are_the_embeddings_and_the_outputs_of_all_layers(variant: str) -> None:
    model = hf.HSACompileForCausalLM.of(build(small_config(variant)))
    tokens = torch.randint(1, 19, (2, 24), generator=torch.Generator().manual_seed(0))
    output = model(tokens, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    embedded = model.model.with_tokens_before(model.get_input_embeddings()(tokens))
    torch.testing.assert_close(output.hidden_states[0], embedded)
    torch.testing.assert_close(model.model.logits(output.hidden_states[-1]), output.logits)
    seen: list[torch.Tensor] = []
    hook = model.model.lower[0].register_forward_hook(lambda _, __, result: seen.append(result[0]))
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.int64), tokens), dim=1)
    mask = (padded > 0).long()
    states = model(padded, attention_mask=mask, output_hidden_states=True).hidden_states
    hook.remove()
    for state, alone in zip(states, output.hidden_states, strict=True):
        torch.testing.assert_close(state[:, 3:], alone, atol=1e-4, rtol=1e-4)
    if variant != "drt":  # its layers see landmark tokens, too
        torch.testing.assert_close(states[1][:, 3:], seen[0][:, :24])


class Batches(torch.utils.data.IterableDataset):
    """Rows in a fixed order, all of whose tokens but the first are predicted."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        for row in self.rows:
            yield {"input_ids": row, "labels": torch.cat((torch.tensor([-100]), row[1:]))}


@pytest.mark.exhaustive
def test_trainer_goes_where_our_trainer_goes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs it")
    num_steps, rows, length = 50, 4, 32
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(97, 101, (num_steps * rows, length), generator=generator)
    changes: dict[str, Any] = {"num_experts": 0, "selection_noise": False, "init_std": 0.1}
    ours, theirs = wrapped(**changes).model.train(), wrapped(**changes)
    config = TrainConfig(
        steps=num_steps, lr=1e-3, warmup_steps=0, decay="constant", weight_decay=0.01, precision="float32"
    )
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path, max_steps=num_steps, per_device_train_batch_size=rows, learning_rate=config.lr,
        lr_scheduler_type="constant", weight_decay=config.weight_decay, adam_beta1=config.beta1,
        adam_beta2=config.beta2, adam_epsilon=config.eps, max_grad_norm=config.clip, logging_steps=1, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(theirs, arguments, train_dataset=Batches(tokens))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    loss_model = LossModel(ours, config.loss_chunk)
    optimizer = make_optimizer(ours, config)
    expected = []
    for step, batch in enumerate(tokens.split(rows)):
        weights = torch.ones(batch.shape).index_fill(1, torch.tensor([0]), 0)
        plan = StepPlan(step=step, stage=0, length=length, num_rows=rows)
        feed = StepBatch(plan=plan, tokens=batch, weights=weights, is_answer=torch.zeros_like(batch, dtype=torch.bool))
        expected.append(run_step(loss_model, optimizer, feed, config, Processes(device=torch.device("cpu"))).loss)
    assert expected[-1] < expected[0] - 1
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), atol=1e-4, rtol=1e-4)
    trainer.save_model(tmp_path / "saved")
    assert torch.equal(from_pretrained(tmp_path / "saved").embedding.weight, theirs.model.embedding.weight)


def test_trainer_loads_the_weights_that_it_saved(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs it")
    tokens = torch.randint(97, 101, (6, 16), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {
        "output_dir": tmp_path, "per_device_train_batch_size": 1, "learning_rate": 1e-2, "use_cpu": True,
        "save_strategy": "steps", "save_steps": 2, "report_to": [], "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    trained = wrapped()
    first = transformers.TrainingArguments(max_steps=2, **options)
    transformers.Trainer(trained, first, train_dataset=Batches(tokens)).train()
    resumed = wrapped()
    again = transformers.TrainingArguments(max_steps=2, ignore_data_skip=True, **options)
    transformers.Trainer(resumed, again, train_dataset=Batches(tokens)).train(resume_from_checkpoint=True)
    assert not torch.equal(trained.model.embedding.weight, wrapped().model.embedding.weight)
    for name, weight in trained.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name


def test_weights_are_loaded_by_their_names_in_a_file_and_in_the_module(tmp_path: Path) -> None:
    model = wrapped()
    model.save_pretrained(tmp_path)
    others = {name: torch.zeros_like(weight) for name, weight in model.state_dict().items()}
    for names in (read_tensors(tmp_path / "model.safetensors"), dict(model.state_dict())):
        for found in (wrapped(), copy.deepcopy(wrapped())):
            found.load_state_dict(others)
            found.load_state_dict(names)
            assert all(torch.equal(found.state_dict()[name], weight) for name, weight in model.state_dict().items())
    inside = torch.nn.ModuleDict({"module": wrapped()})  # as a wrapper of several processes names it
    inside.load_state_dict(
        {f"module.{name}": weight for name, weight in read_tensors(tmp_path / "model.safetensors").items()}
    )
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"model\.foreign\""):
        model.load_state_dict({**model.state_dict(), "foreign": torch.zeros(1)})


def test_the_model_class_of_the_harness_scores_as_ours_does(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the harness's own model class needs it")
    models = pytest.importorskip("lm_eval.models.huggingface")
    harness = pytest.importorskip("hsa_compile.model.evaluation.harness")
    model = wrapped()
    pairs = [("one context", " and more"), ("one context", "?"), ("another", "b")]
    requests = [harness.Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    theirs = models.HFLM(pretrained=model, tokenizer=hf.HSABytesTokenizer(), batch_size=2, device="cpu")
    subject = Subject(name="small", model=model.model, tokenizer=load_tokenizer("bytes"))
    with OutcomeFile(tmp_path / "outcomes.jsonl") as outcomes:
        expected = harness.HarnessModel(subject, outcomes, quiet=True).loglikelihood(requests)
    for found, wanted in zip(theirs.loglikelihood(requests), expected, strict=True):
        assert found[0] == pytest.approx(wanted[0], abs=1e-4)
        assert found[1] == wanted[1]
