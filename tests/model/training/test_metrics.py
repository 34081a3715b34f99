"""Records are lines that can be cut back; entropy and peaks are what they say."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from hsa_compile.errors import MissingDependency, SaveError
from hsa_compile.model.layers.hs_attention import Selection
from hsa_compile.model.training import metrics
from hsa_compile.model.training.metrics import METRICS_FILE, MetricsLog, peak_flops, retrieval_entropy


def test_a_log_is_cut_to_the_size_that_a_checkpoint_knows(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write({"step": 1, "loss": 0.1})
    size = log.sync()
    log.write({"step": 2, "loss": 0.2})
    log.close()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 3, "lo')  # killed while writing

    log = MetricsLog(tmp_path, size=size)
    log.write({"step": 2, "loss": 0.2})
    log.close()
    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_numbers_go_to_tensorboard_and_wandb_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Board:
        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, value, step))

        def log(self, numbers: dict[str, float], step: int) -> None:
            seen.append((numbers, step))

        def close(self) -> None: ...
        def finish(self) -> None: ...

    monkeypatch.setattr(metrics, "_tensorboard", lambda directory: Board())
    monkeypatch.setattr(metrics, "_wandb", lambda directory, project: Board())
    log = MetricsLog(tmp_path, wandb_project="mine")
    log.write({"step": 4, "probe": True, "loss": 0.5, "answer_loss": None})
    log.close()
    assert log.has_tensorboard
    assert seen == [("loss", 0.5, 4), ({"loss": 0.5}, 4)]


def test_a_missing_wandb_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(MissingDependency, match=r"pip install 'hsa-compile\[wandb\]'"):
        MetricsLog(tmp_path, wandb_project="mine")


def test_entropy_is_that_of_tokens_with_a_choice() -> None:
    indices = torch.tensor([[-1, -1], [0, -1], [1, 0], [1, 0]]).view(1, 4, 1, 2)
    weights = torch.tensor([[0, 0], [1, 0], [0.5, 0.5], [1, 0]]).view(1, 4, 1, 2)
    found = retrieval_entropy([Selection(indices=indices, weights=weights)])
    assert found == pytest.approx(math.log(2) / 2)
    assert retrieval_entropy([Selection(indices=indices[:, :2], weights=weights[:, :2])]) is None


def test_the_peak_is_what_was_told_or_unknown_on_a_cpu() -> None:
    assert peak_flops(torch.device("cpu"), 0) is None
    assert peak_flops(torch.device("cpu"), 0.5) == 5e11


@pytest.mark.slow
@pytest.mark.usefixtures("tensorboard")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_files_are_written_where_it_is_installed(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write({"step": 1, "loss": 0.5})
    log.close()
    assert log.has_tensorboard
    assert list((tmp_path / metrics.TENSORBOARD).glob("events.*"))


def test_a_full_disk_is_one_error_and_the_file_can_be_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path)
    log.write({"step": 1, "loss": 0.5})
    size, real = log.sync(), os.write

    def full(file: int, data: bytes) -> int:
        if len(data) > 9:
            return real(file, data[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.os, "write", full)
    with pytest.raises(SaveError, match=r"metrics\.jsonl cannot be written: No space left on device; --resume goes on"):
        log.write({"step": 2, "loss": 0.25})
    log.close()
    monkeypatch.undo()
    assert (tmp_path / METRICS_FILE).stat().st_size > size
    log = MetricsLog(tmp_path, size=size)
    log.write({"step": 2, "loss": 0.25})
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / METRICS_FILE).read_text().splitlines()] == [1, 2]


def test_what_is_no_regular_file_is_named_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / METRICS_FILE)
    with pytest.raises(SaveError, match=r"metrics\.jsonl cannot be written: it is no regular file"):
        MetricsLog(tmp_path)
