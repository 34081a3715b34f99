"""One line a warning, and one for all that a model lacks."""

from types import SimpleNamespace

import pytest

from hsa_compile.cli import main as warning_lines
from hsa_compile.cli.main import show_warning
from hsa_compile.errors import CacheWarning, DistantWarning, UntunedWarning

UNTUNED = "no tuned schedule for hsa_forward, the default runs; tune it with: hsa-compile tune --seq-len 63"


@pytest.fixture(autouse=True)
def _anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warning_lines, "_advised", set())


def inside(monkeypatch: pytest.MonkeyPatch, command: str, **params: str | None) -> None:
    context = SimpleNamespace(info_name=command, params=params)
    monkeypatch.setattr("click.get_current_context", lambda silent: context)


def shown(capsys: pytest.CaptureFixture[str], text: str, category: type[Warning]) -> str:
    show_warning(text, category, "file.py", 1)
    return capsys.readouterr().err


def test_a_model_command_says_once_which_command_tunes_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inside(monkeypatch, "generate", name="tiny", dtype="bf16")
    assert shown(capsys, UNTUNED, UntunedWarning) == (
        "warning: no tuned schedule for hsa_forward, the default runs; "
        "tune all that this model needs with: hsa-compile tune --preset tiny --dtype bf16\n"
    )
    assert shown(capsys, UNTUNED, UntunedWarning) == ""


def test_training_names_its_own_flag(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    inside(monkeypatch, "train", preset="tiny")
    assert "with --tune, train first tunes what it needs" in shown(capsys, UNTUNED, UntunedWarning)


def test_a_model_that_was_tuned_is_not_told_of_distances(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inside(monkeypatch, "eval", name="tiny", dtype=None)
    assert shown(capsys, "runs on the schedule of another", DistantWarning) == ""


def test_elsewhere_each_warning_keeps_its_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inside(monkeypatch, "bench")
    for _ in range(2):
        assert shown(capsys, UNTUNED, UntunedWarning) == f"warning: {UNTUNED}\n"
    inside(monkeypatch, "eval", name="tiny", dtype=None)
    assert shown(capsys, "an entry is damaged", CacheWarning) == "warning: an entry is damaged\n"
