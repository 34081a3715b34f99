"""A run in its directory: what it leaves, that it learns, and that it goes on bit for bit."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import small_run

from hsa_compile.errors import HSACompileWarning, InvalidArgument, SaveError, TrainingError
from hsa_compile.model.data.documents import find_sources
from hsa_compile.model.data.prepare import prepare
from hsa_compile.model.data.tokenizer import load_tokenizer
from hsa_compile.model.pretrained import from_pretrained, read_extra, read_tokenizer
from hsa_compile.model.training import run as run_module
from hsa_compile.model.training.checkpoint import best_checkpoint, checkpoints, read_state
from hsa_compile.model.training.config import RunConfig
from hsa_compile.model.training.config_file import from_dict
from hsa_compile.model.training.pace import StepFlops
from hsa_compile.model.training.processes import Processes
from hsa_compile.model.training.run import CHECKPOINTS, MODEL, TrainingRun, saved_config
from hsa_compile.model.training.step import chosen_precision

pytestmark = [
    pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning"),
]


PLAIN = {"variant": "swa"}  # where the kind of the model does not matter


def records(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def losses(directory: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in records(directory) if "loss" in record]


def train(
    config: RunConfig, directory: Path, alone: Processes, *, resume: bool = False, until: int | None = None
) -> bool:
    """Trains to the end, or asks it to stop after a step."""
    run = TrainingRun(config, directory, alone, resume=resume)
    try:
        return run.train(lambda: until is not None and run.state.step >= until - 1)
    finally:
        run.close()


def test_a_run_leaves_config_records_checkpoints_and_a_model(tmp_path: Path, alone: Processes) -> None:
    config = small_run(probe_every=3, probe_samples=2, precision="auto")
    assert train(config, tmp_path, alone)
    assert saved_config(tmp_path) == config
    found = records(tmp_path)
    assert [record["step"] for record in found if "loss" in record] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in found if "probe" in record] == [3, 6]
    assert [record["stage"] for record in found if "loss" in record] == [0, 0, 0, 1, 1, 1]
    lengths = [record["seq_len"] for record in found if "loss" in record]
    whole_rows = itertools.accumulate(300 // length * length for length in lengths)  # of the 300 tokens of a step
    assert [record["tokens"] for record in found if "loss" in record] == list(whole_rows)
    assert all("retrieval_entropy" in record for record in found if "loss" in record and record["step"] % 3 == 0)
    assert [read_state(path).step for path in checkpoints(tmp_path / CHECKPOINTS)] == [4, 6]

    model = from_pretrained(tmp_path / MODEL)
    assert (model.config.window, model.config.top_k) == (12, 2)  # of the last stage
    trained = read_extra(tmp_path / MODEL)["training"]
    assert trained["step"] == 6
    assert trained["config"]["train"]["precision"] == "auto"
    assert trained["precision"] == chosen_precision("auto", alone.device)


def test_the_model_has_the_tokenizer_of_its_corpus(tmp_path: Path, alone: Processes) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "</s>": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    (tmp_path / "text.txt").write_text("a b " * 500)
    sources = find_sources([tmp_path / "text.txt"])
    prepare(sources, tmp_path / "corpus", tokenizer=tmp_path / "words.json", validation=0)
    assert train(on_text(tmp_path / "corpus", 0.0, "noise", model=PLAIN, steps=1), tmp_path / "run", alone)
    folder = tmp_path / "run" / MODEL
    assert load_tokenizer(folder / read_tokenizer(folder)).encode("b a").tolist() == [1, 0]
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "words.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["hsa-ultralong", "drt", "swa"])
def test_records_have_the_retrieval_loss_of_models_whose_tokens_choose(
    variant: str, tmp_path: Path, alone: Processes
) -> None:
    train(small_run(model={"variant": variant}, retrieval_loss=0.5), tmp_path, alone)
    told = [record.get("retrieval_loss") for record in records(tmp_path) if "loss" in record]
    assert told
    if variant == "hsa-ultralong":
        assert all(loss > 0 for loss in told)
    else:
        assert told == [None] * len(told)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "sharper"), [("hsa-ultralong", 2.0), ("drt", 2.0), ("ramba", 0.5)])
def test_scores_are_sharper_in_the_saved_model_alone_and_where_weights_are_a_softmax(
    variant: str, sharper: float, tmp_path: Path, alone: Processes
) -> None:
    model = {"variant": variant, "retrieval_scale": 0.5}
    for name, sharpen in (("as it is", 1.0), ("sharper", 4.0)):
        assert train(small_run(model=model, sharpen_scores=sharpen, steps=2), tmp_path / name, alone)
    assert losses(tmp_path / "as it is") == losses(tmp_path / "sharper")
    one, two = (from_pretrained(tmp_path / name / MODEL) for name in ("as it is", "sharper"))
    assert (one.config.retrieval_scale, two.config.retrieval_scale) == (0.5, sharper)
    assert all(torch.equal(tensor, two.state_dict()[name]) for name, tensor in one.state_dict().items())


def test_rows_share_their_chunks_where_a_stage_says_so(tmp_path: Path, alone: Processes) -> None:
    for name, shared in (("one by one", False), ("together", True), ("interrupted", True)):
        stages = [{"seq_len": 64, "batch_tokens": 256, "in_batch_memory": shared}]
        config = small_run(steps=3, stages=stages)
        if name == "interrupted":
            assert not train(config, tmp_path / name, alone, until=2)
        assert train(config, tmp_path / name, alone, resume=name == "interrupted")
    assert losses(tmp_path / "one by one")[0] != losses(tmp_path / "together")[0]
    assert losses(tmp_path / "interrupted") == losses(tmp_path / "together")


def test_frozen_parts_stay_as_they_are_until_a_stage_moves_them(tmp_path: Path, alone: Processes) -> None:
    frozen = ["convolution", "embedding", "output"]  # the embedding is the output as well
    stages = [{"seq_len": 64, "batch_tokens": 128, "frozen": frozen}, {"seq_len": 64, "batch_tokens": 128}]
    model = {"embedding_window": 3, "tie_embeddings": True}
    config = small_run(model=model, stages=stages, steps=8, save_every=0, weight_decay=0.5)
    run = TrainingRun(config, tmp_path / "whole", alone)
    first = {name: weight.clone() for name, weight in run.model.named_parameters()}

    after: dict[int, set[str]] = {}  # so many steps, what has moved

    def look() -> bool:
        moved = {name for name, weight in run.model.named_parameters() if not torch.equal(weight, first[name])}
        after[run.state.step] = moved
        return False  # goes on

    assert run.train(look)
    run.close()
    assert after[0] == set()
    assert {name.partition(".")[0] for name in after[4]} == {"lower", "chunk_encoder", "upper", "norm"}
    assert {"convolution.weight", "embedding.weight"} < after[7]
    assert not train(config, tmp_path / "parts", alone, until=3)
    assert saved_config(tmp_path / "parts") == config
    assert train(config, tmp_path / "parts", alone, resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_the_routers_of_frozen_parts_stay_as_they_are(tmp_path: Path, alone: Processes) -> None:
    stages = [{"seq_len": 64, "batch_tokens": 128, "frozen": ["upper"]}, {"seq_len": 64, "batch_tokens": 128}]
    run = TrainingRun(small_run(model={"num_experts": 4}, stages=stages, steps=4, save_every=0), tmp_path, alone)
    biases = {name: bias for name, bias in run.model.named_buffers() if name.endswith("balance_bias")}
    moved: list[set[str]] = []
    run.train(lambda: moved.append({name.partition(".")[0] for name, bias in biases.items() if bias.any()}) or False)
    run.close()
    assert moved[1] == {"lower"}
    assert moved[3] == {"lower", "upper"}


def test_the_share_of_the_peak_counts_what_each_stage_computes(tmp_path: Path, alone: Processes) -> None:
    stages = [{"seq_len": 128, "batch_tokens": 256, "window": window} for window in (8, 64)]
    config = small_run(stages=stages, steps=4, log_every=1, peak_tflops=1.0)
    assert train(config, tmp_path, alone)
    flops = StepFlops(config, 1)
    assert flops(1, 128) > flops(0, 128)
    for record in records(tmp_path):
        expected = record["tokens_per_second"] * flops(record["stage"], 128) / 256 / 1e12
        assert record["mfu"] == pytest.approx(expected)


def test_it_learns(tmp_path: Path, alone: Processes) -> None:
    stages = [{"seq_len": 64, "batch_tokens": 256}]
    assert train(small_run(model=PLAIN, steps=30, lr=1e-2, save_every=0, stages=stages), tmp_path, alone)
    found = [loss for _, loss in losses(tmp_path)]
    assert found[-1] < 0.75 * found[0]


@pytest.mark.parametrize(
    "variant",
    ["hsa-ultralong", "ramba", *(pytest.param(name, marks=pytest.mark.slow) for name in ("drt", "swa", "full"))],
)
def test_every_variant_stops_and_goes_on_bit_for_bit(variant: str, tmp_path: Path, alone: Processes) -> None:
    config = small_run(model={"variant": variant}, steps=4, probe_every=4, probe_samples=1)
    assert train(config, tmp_path / "whole", alone)
    assert not train(config, tmp_path / "parts", alone, until=3)
    assert train(config, tmp_path / "parts", alone, resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    one, two = (from_pretrained(tmp_path / name / MODEL).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_steps_after_the_last_checkpoint_are_run_and_recorded_again(tmp_path: Path, alone: Processes) -> None:
    config = small_run(model=PLAIN, save_every=4)
    assert train(config, tmp_path / "whole", alone)
    run = TrainingRun(config, tmp_path / "killed", alone)

    def killed() -> bool:
        if run.state.step == 5:
            raise RuntimeError("as if killed")
        return False

    with pytest.raises(RuntimeError, match="as if killed"):
        run.train(killed)
    run.close()
    assert len(losses(tmp_path / "killed")) == 5
    assert train(config, tmp_path / "killed", alone, resume=True)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path: Path, alone: Processes) -> None:
    train(small_run(model=PLAIN), tmp_path, alone)
    before = losses(tmp_path)
    assert train(small_run(model=PLAIN), tmp_path, alone, resume=True)
    assert losses(tmp_path) == before


@pytest.mark.slow
def test_another_seed_gives_other_losses(tmp_path: Path, alone: Processes) -> None:
    train(small_run(model=PLAIN), tmp_path / "a", alone)
    train(small_run(model=PLAIN, seed=1), tmp_path / "b", alone)
    assert losses(tmp_path / "a") != losses(tmp_path / "b")


def test_a_directory_that_holds_a_run_is_not_begun_anew(tmp_path: Path, alone: Processes) -> None:
    train(small_run(model=PLAIN), tmp_path, alone)
    with pytest.raises(InvalidArgument, match="holds a run; --resume goes on with it"):
        TrainingRun(small_run(model=PLAIN), tmp_path, alone)


def test_resume_without_a_checkpoint_begins(tmp_path: Path, alone: Processes) -> None:
    TrainingRun(small_run(model=PLAIN), tmp_path, alone).close()
    assert train(small_run(model=PLAIN), tmp_path, alone, resume=True)
    assert len(losses(tmp_path)) == 6


def test_a_full_disk_while_saving_keeps_the_checkpoint_before(
    tmp_path: Path, alone: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_run(model=PLAIN)
    train(config, tmp_path / "whole", alone)
    saves = []
    real = run_module.save_checkpoint

    def save(*arguments: Any) -> Path:
        saves.append(1)
        if len(saves) == 2:
            raise SaveError("cannot be written (No space left on device)")
        return real(*arguments)

    monkeypatch.setattr(run_module, "save_checkpoint", save)
    with pytest.raises(SaveError, match="No space left"):
        train(config, tmp_path / "full", alone)
    assert train(config, tmp_path / "full", alone, resume=True)
    assert losses(tmp_path / "full") == losses(tmp_path / "whole")


def corpus(tmp_path: Path, text: str) -> Path:
    source = tmp_path / f"{len(text)}.txt"
    source.write_text(text)
    prepare(find_sources([source]), tmp_path / "corpus", validation=0, overwrite=True)
    return tmp_path / "corpus"


def on_text(directory: Path, synthetic_share: float, haystack: str = "corpus", **train_changes: object) -> RunConfig:
    stage = {"seq_len": 64, "batch_tokens": 256, "synthetic_share": synthetic_share, "haystacks": {haystack: 1.0}}
    values = small_run(**train_changes).to_dict()
    return from_dict({**values, "data": {"corpus": str(directory)}, "stages": [stage]})


@pytest.mark.parametrize("haystack", ["corpus", pytest.param("assignments", marks=pytest.mark.slow)])
def test_plain_text_and_needles_in_text_are_trained_on(haystack: str, tmp_path: Path, alone: Processes) -> None:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text("What is written = here is learnt by heart. " * (number + 2))
    prepare(find_sources(sorted(tmp_path.glob("*.txt"))), tmp_path / "corpus", validation=0.5)
    config = on_text(tmp_path / "corpus", 0.5, haystack, probe_every=3, probe_samples=2)
    assert train(config, tmp_path / "run", alone)
    assert records(tmp_path / "run")[-1]["held_out_loss"] > 0


def test_a_corpus_without_held_out_text_has_no_held_out_loss(tmp_path: Path, alone: Processes) -> None:
    directory = corpus(tmp_path, "What is written here is learnt by heart. " * 20)
    config = on_text(directory, 0.0, probe_every=3, probe_samples=2)
    with pytest.warns(HSACompileWarning, match="validation split of .* has 0 tokens, and a row has 64"):
        train(config, tmp_path / "run", alone, until=3)
    assert "held_out_loss" not in records(tmp_path / "run")[-1]
    assert best_checkpoint(tmp_path / "run" / CHECKPOINTS) is None


def test_a_corpus_that_changed_is_refused(tmp_path: Path, alone: Processes) -> None:
    config = on_text(corpus(tmp_path, "One text. " * 50), 0.0)
    train(config, tmp_path / "run", alone, until=2)
    corpus(tmp_path, "Another text. " * 50)
    with pytest.raises(TrainingError, match="has other text than when"):
        TrainingRun(config, tmp_path / "run", alone, resume=True)


def test_rows_longer_than_the_corpus_are_refused(tmp_path: Path, alone: Processes) -> None:
    config = on_text(corpus(tmp_path, "Short."), 0.0)
    with pytest.raises(InvalidArgument, match=r"stages\.0\.seq_len = 64 is more than the 7 tokens"):
        TrainingRun(config, tmp_path / "run", alone)


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path: Path, alone: Processes) -> None:
    config = small_run(model=PLAIN)
    first = TrainingRun(config, tmp_path, alone)
    try:
        with pytest.raises(InvalidArgument, match="holds a run"):
            TrainingRun(config, tmp_path, alone)
        with pytest.raises(TrainingError, match="another process trains in"):
            TrainingRun(config, tmp_path, alone, resume=True)
        assert first.train()
    finally:
        first.close()
    assert len(losses(tmp_path)) == 6  # no step twice
    assert train(config, tmp_path, alone, resume=True)


def test_of_two_that_begin_at_once_one_is_refused(
    tmp_path: Path, alone: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, real, began = small_run(model=PLAIN), run_module.make_optimizer, []

    def meanwhile(*arguments: Any) -> Any:
        """Another run begins and ends between the first look at the folder and the lock."""
        if not began:
            began.append(1)
            TrainingRun(config, tmp_path, alone).close()
        return real(*arguments)

    monkeypatch.setattr(run_module, "make_optimizer", meanwhile)
    with pytest.raises(InvalidArgument, match="holds a run"):
        TrainingRun(config, tmp_path, alone)
    assert train(config, tmp_path, alone, resume=True)  # what was refused holds the folder no more


def test_a_corpus_of_more_tokens_than_the_model_knows_is_refused(tmp_path: Path, alone: Processes) -> None:
    config = on_text(corpus(tmp_path, "Some text. " * 50), 0.0, "noise")
    manifest = tmp_path / "corpus" / "manifest.json"
    values = json.loads(manifest.read_text())
    for name in ("train", "validation"):
        tokens = tmp_path / "corpus" / f"{name}.tokens"
        tokens.write_bytes(b"".join(bytes([token, 0]) for token in tokens.read_bytes()))
    manifest.write_text(json.dumps({**values, "vocab_size": 300, "dtype": "uint16"}))
    with pytest.raises(InvalidArgument, match=r"model\.vocab_size = 256 must be at least 300, the vocabulary of"):
        TrainingRun(config, tmp_path / "run", alone)


@pytest.mark.parametrize("text", ["w", "One document, and nothing else. " * 9])
def test_a_corpus_of_one_document_trains_or_says_what_it_lacks(text: str, tmp_path: Path, alone: Processes) -> None:
    config = on_text(corpus(tmp_path, text), 0.0, steps=1, probe_every=0)
    if len(text) > 64:
        assert train(config, tmp_path / "run", alone)
    else:
        with pytest.raises(InvalidArgument, match=r"is more than the 2 tokens of"):
            TrainingRun(config, tmp_path / "run", alone)


def test_records_that_a_full_disk_swallowed_leave_no_hole(tmp_path: Path, alone: Processes) -> None:
    config = small_run(model=PLAIN)
    train(config, tmp_path, alone, until=4)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.warns(HSACompileWarning, match=r"metrics\.jsonl has lost records"):
        run = TrainingRun(config, tmp_path, alone, resume=True)
    run.train()
    run.close()
    assert b"\0" not in path.read_bytes()
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3, 5, 6]


def test_weights_that_are_not_finite_are_neither_saved_nor_exported(
    tmp_path: Path, alone: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, real = small_run(model=PLAIN), run_module.run_step

    def broken(loss_model: Any, optimizer: Any, batch: Any, *arguments: Any, **more: Any) -> Any:
        result = real(loss_model, optimizer, batch, *arguments, **more)
        if batch.plan.step == 5:
            with torch.no_grad():
                loss_model.model.norm.weight[3] = float("inf")
        return result

    monkeypatch.setattr(run_module, "run_step", broken)
    with pytest.raises(TrainingError, match=r"the weights norm\.weight are not finite after step 6; a lower train\.lr"):
        train(config, tmp_path, alone)
    assert [read_state(path).step for path in checkpoints(tmp_path / CHECKPOINTS)] == [2, 4]
    assert not (tmp_path / MODEL).exists()
    monkeypatch.undo()
    assert train(config, tmp_path, alone, resume=True)
