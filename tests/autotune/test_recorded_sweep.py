"""Recorded sweeps: ours written and read, Kernel Tuner's read, damaged ones refused."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from hsa_compile import Problem, Schedule, Target
from hsa_compile.autotune.sweeps import RecordedSweep
from hsa_compile.errors import InvalidArgument

SHARED = Path(__file__).resolve().parents[3] / "shared" / "sweeps"

KERNEL_TUNER: dict[str, Any] = {
    "device_name": "some GPU",
    "tune_params_keys": ["bx", "by"],
    "tune_params": {"bx": [16, 32], "by": [1, 2]},
    "cache": {
        "16,1": {"bx": 16, "by": 1, "time": 2.5, "times": [2.4, 2.6]},
        "16,2": {"bx": 16, "by": 2, "time": "RuntimeFailedConfig"},
        "32,1": {"bx": 32, "by": 1, "time": 1e20},
        "32,2": {"bx": 32, "by": 2, "time": 2, "times": [2]},
    },
}


def check_kernel_tuner(sweep: RecordedSweep) -> None:
    assert sweep.points[1] == {"bx": 16, "by": 2}
    assert sweep.times == [2.5, None, None, 2.0]
    assert sweep.reasons[1] == "RuntimeFailedConfig"
    assert sweep.optimum == 2.0
    assert sweep.about["device_name"] == "some GPU"


@pytest.mark.parametrize("name", ["sweep.json", "sweep.json.gz"])
def test_what_is_saved_is_read(tmp_path: Path, name: str) -> None:
    problem, target = Problem(seq_len=1024, num_heads=8, num_kv_heads=2, head_dim=64, top_k=4), Target.parse("sm_90")
    results: dict[Schedule, float | str] = {
        Schedule.of("token", num_warps=2, num_stages=1): 1.5,
        Schedule.of("token", num_warps=4, num_stages=1): "OutOfResources: shared memory",
        Schedule.of("chunk", reduce="slots", block_entries=4): 1.25,
    }
    sweep = RecordedSweep.of_schedules(results, problem=problem, target=target)
    sweep.save(tmp_path / "new" / name)
    read = RecordedSweep.load(tmp_path / "new" / name)
    assert read == sweep
    assert read.points[2] == {"dataflow": "chunk", "chunk.reduce": "slots", "chunk.block_entries": 4}
    assert read.times == [1.5, None, 1.25]
    assert read.reasons == ["", "OutOfResources: shared memory", ""]
    assert read.about["problem"]["seq_len"] == 1024
    assert read.about["target"]["arch"] == "sm_90"
    assert "torch" in read.about["versions"]


def test_equal_sweeps_are_equal_files(tmp_path: Path) -> None:
    sweep = RecordedSweep(points=[{"a": 1}], times=[1.0], reasons=[""])
    for name in ("one.gz", "two.gz"):
        sweep.save(tmp_path / name)
    assert (tmp_path / "one.gz").read_bytes() == (tmp_path / "two.gz").read_bytes()


@pytest.mark.parametrize("missing", ["", "}", "}}", "}\n}", ",}}"], ids=repr)
def test_files_of_kernel_tuner_are_read_also_without_their_closing_braces(tmp_path: Path, missing: str) -> None:
    text = json.dumps(KERNEL_TUNER, indent=0)
    closed = text.rstrip("}\n ") + "}"  # up to the end of the last record
    ends = {"": closed + "}\n}", "}": closed + "}", "}}": closed, "}\n}": closed + "\n", ",}}": closed + ",\n"}
    (tmp_path / "cache.json").write_text(ends[missing])
    check_kernel_tuner(RecordedSweep.load(tmp_path / "cache.json"))


def test_compressed_files_of_kernel_tuner_are_read_whatever_their_name(tmp_path: Path) -> None:
    (tmp_path / "sweep").write_bytes(gzip.compress(json.dumps(KERNEL_TUNER).encode()))
    check_kernel_tuner(RecordedSweep.load(tmp_path / "sweep"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not json", "is not JSON"),
        (b"\x1f\x8bnot gzip", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"a": 1}', "neither"),
        (b'{"format": "hsa-compile sweep", "version": 99, "points": []}', "version 99"),
        (b'{"format": "hsa-compile sweep", "version": 1, "about": {}}', "damaged: KeyError: .*points"),
        (b'{"tune_params_keys": ["a"], "cache": {"1": {"time": 1}}}', "damaged: KeyError: .*a"),
        (b'{"tune_params_keys": ["a"], "cache": {"1": {"a": 1, "time": "Failed"}}}', "none of 1 points has a time"),
    ],
    ids=["text", "gzip", "encoding", "foreign", "version", "no points", "no value", "all failed"],
)
def test_what_is_no_sweep_is_refused_with_the_reason(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(InvalidArgument, match=message):
        RecordedSweep.load(tmp_path / "file")


@pytest.mark.parametrize(
    ("times", "reasons", "message"),
    [
        ([1.0], ["", ""], "as many of each"),
        ([-1.0, 1.0], ["", ""], "time = -1.0 must be a number in"),
        ([None, 1.0], ["", ""], "one of the two"),
    ],
)
def test_sweeps_that_contradict_themselves_are_refused(times: list, reasons: list[str], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        RecordedSweep(points=[{"a": 1}, {"a": 2}], times=times, reasons=reasons)


@pytest.mark.parametrize(
    ("name", "num_points", "num_failed", "num_parameters"),
    [("convolution_a100", 4362, 161, 10), ("pnpoly_rtx3090", 4092, 318, 4)],
)
def test_public_sweeps_are_read(name: str, num_points: int, num_failed: int, num_parameters: int) -> None:
    path = SHARED / f"{name}.json.gz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    sweep = RecordedSweep.load(path)
    assert len(sweep.points) == num_points
    assert sweep.times.count(None) == num_failed
    assert len(sweep.points[0]) == num_parameters
