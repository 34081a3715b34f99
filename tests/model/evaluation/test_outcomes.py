"""The file of outcomes after kills, damage and a second process."""

from pathlib import Path

import pytest

from hsa_compile.errors import HSACompileWarning, SaveError
from hsa_compile.model.evaluation.outcomes import OUTCOMES_FILE, OutcomeFile


def filled(directory: Path) -> Path:
    with OutcomeFile(directory) as outcomes:
        outcomes.add(({"index": index, "task": "ä"}, {"correct": index % 2 == 0}) for index in range(3))
    return directory / OUTCOMES_FILE


def test_what_was_added_is_there_again(tmp_path: Path) -> None:
    filled(tmp_path)
    with OutcomeFile(tmp_path) as outcomes:
        assert [outcomes.get({"task": "ä", "index": index}) for index in range(4)] == [
            {"correct": True}, {"correct": False}, {"correct": True}, None,
        ]  # fmt: skip


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_torn_last_line_is_dropped_and_what_follows_is_whole(tmp_path: Path, cut: int) -> None:
    path = filled(tmp_path)
    path.write_bytes(path.read_bytes()[:-cut])
    outcomes = OutcomeFile(tmp_path)
    with pytest.warns(HSACompileWarning, match="ended in the middle of a line"):
        outcomes.__enter__()
    assert len(outcomes) == 2
    outcomes.add([({"index": 7}, {"correct": True})])
    outcomes.__exit__(None, None, None)
    with OutcomeFile(tmp_path) as outcomes:
        assert len(outcomes) == 3
        assert outcomes.get({"index": 7}) == {"correct": True}


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe", b"{}", b"[1]", b'{"key": 3, "values": 4}', b"0" * 50, b"[" * 200_000, b"\0" * 40,
        b'{"key": {"index": 1}, "values": {}}', b'{"key": {"index": 1}, "values": {"correct": 1}}',
        b'{"key": {"index": 1}, "values": {"loss": NaN, "bytes": 3}}', b'{"key": {"index": 1}, "values": {"text": 5}}',
    ],
    ids=lambda line: str(line[:60]),
)  # fmt: skip
def test_a_damaged_line_costs_one_sample(tmp_path: Path, line: bytes) -> None:
    path = filled(tmp_path)
    lines = path.read_bytes().splitlines()
    lines[1] = line
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.warns(HSACompileWarning, match="damaged in line 2"), OutcomeFile(tmp_path) as outcomes:
        assert len(outcomes) == 2


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        OutcomeFile(tmp_path),
        pytest.raises(SaveError, match="another process evaluates into"),
        OutcomeFile(tmp_path),
    ):
        pass
    with OutcomeFile(tmp_path):
        pass


@pytest.mark.parametrize("step", ["write", "fsync"])
def test_a_full_disk_is_one_error(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with OutcomeFile(tmp_path) as outcomes:
        monkeypatch.setattr(f"hsa_compile.model.evaluation.outcomes.os.{step}", full)
        with pytest.raises(SaveError, match="No space left on device; what was finished is kept"):
            outcomes.add([({"index": 0}, {"correct": True})])
        assert outcomes.get({"index": 0}) is None


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="file"):
        OutcomeFile(tmp_path / "file" / "out")
