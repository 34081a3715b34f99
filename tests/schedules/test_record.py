import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hsa_compile import paths
from hsa_compile.errors import InvalidArgument
from hsa_compile.problem import Problem
from hsa_compile.schedules import ops as schedule_ops
from hsa_compile.schedules.record import Measurement, TuningRecord
from hsa_compile.target import Target

MakeRecord = Callable[..., TuningRecord]
TIMES: dict[str, Any] = {"median_ms": 1.0, "p20_ms": 0.9, "p80_ms": 1.1, "repeats": 3}


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "1.0", None])
@pytest.mark.parametrize("name", ["median_ms", "p20_ms", "p80_ms"])
def test_a_time_that_is_no_positive_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=f"{name} = .* must be a number in 1e-09"):
        Measurement(**{**TIMES, name: value})


@pytest.mark.parametrize("value", [-1, 2.5, None])
def test_a_measurement_without_a_number_of_repeats_is_refused(value: Any) -> None:
    with pytest.raises(InvalidArgument, match="repeats"):
        Measurement(**{**TIMES, "repeats": value})


def test_a_prediction_is_a_time_without_repeats_and_only_that(make_record: MakeRecord) -> None:
    time = Measurement.predicted(1.5)
    assert (time.median_ms, time.repeats) == (1.5, 0)
    record = replace(make_record(), measurement=time, default_measurement=time, kind="predicted")
    assert TuningRecord.from_dict(record.to_dict()) == record
    for wrong in ({"kind": "measured"}, {"measurement": make_record().measurement}, {"kind": "guessed"}):
        with pytest.raises(InvalidArgument):
            replace(record, **wrong)


def test_a_record_from_before_kinds_were_kept_is_measured_by_unknown_kernels(make_record: MakeRecord) -> None:
    values = make_record().to_dict()
    del values["kind"], values["kernel_source"]
    old = TuningRecord.from_dict(values)
    assert (old.kind, old.kernel_source) == ("measured", "")


def test_a_record_knows_the_templates_of_its_op(make_record: MakeRecord) -> None:
    sources = {make_record(op=op, deterministic=False).kernel_source for op in ("hsa_forward", "hsa_backward")}
    assert len(sources) == 2
    assert all(len(source) == 12 for source in sources)


def test_another_text_of_a_template_is_another_kernel_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_problem: Callable[..., Problem], gpu: Target
) -> None:
    copy = tmp_path / "templates"
    shutil.copytree(paths.TEMPLATE_DIR, copy)
    monkeypatch.setattr(schedule_ops, "TEMPLATE_DIR", copy)
    monkeypatch.setattr(schedule_ops, "_digest", schedule_ops._digest.__wrapped__)  # which is not remembered
    versions = [schedule_ops.source_version(make_problem(), gpu)]
    for name in ("hsa_forward/chunk.py.jinja", "parts/rows.py.jinja", "hsa_backward/chunk.py.jinja"):
        with (copy / "triton" / name).open("a") as file:
            file.write("# another text\n")
        versions.append(schedule_ops.source_version(make_problem(), gpu))
    assert len(set(versions)) == 3
    assert versions[2] == versions[3]  # the text of another op


def test_a_dict_gives_back_the_same_record(make_record: MakeRecord) -> None:
    record = make_record()
    assert TuningRecord.from_dict(record.to_dict()) == record


NUMBERS = (float("inf"), float("nan"), 10**400, -1, "7", {}, None, True)


@pytest.mark.parametrize(
    ("place", "values"),
    [
        (("trials",), NUMBERS),
        (("failures", "WrongResult"), NUMBERS),
        (("measurement", "median_ms"), NUMBERS[:-1]),
        (("target", "num_cores"), NUMBERS),
        (("problem", "seq_len"), NUMBERS),
        (("confidence",), (*NUMBERS[:-2], 2)),
        (("clocks_mhz",), ([], "fast", 7, {"sm": "fast"}, {"sm": float("inf")}, {"sm": 10**400}, {"\ud800": 1})),
        (("problem", "packed"), ({}, [], 1, None)),
        (("target", "has_compiler"), ({}, 1)),
        (("complete",), ({}, 1, None)),
        (("date",), ("\ud800", "\x1b[2J", 7, None, "9" * 2000)),
        (("versions", "torch"), ("\ud800", 2.1, None)),
        (("target", "name"), ("\ud800", "\x1b[2J", [], None)),
        (("schedule", "dataflow"), ("\ud800", 7, None)),
        (("schedule", "\ud800"), (1,)),
        (("schedule", "num_warps"), ("\ud800", float("inf"), {})),
    ],
)
def test_a_value_of_another_type_or_beyond_all_bounds_is_refused(
    place: tuple[str, ...], values: tuple[Any, ...], make_record: MakeRecord
) -> None:
    for value in values:
        changed = make_record().to_dict()
        inner = changed[place[0]] if len(place) > 1 else changed
        inner[place[-1]] = value
        with pytest.raises(InvalidArgument):
            TuningRecord.from_dict(changed)


def test_the_speedup_is_the_default_time_over_the_tuned_one(make_record: MakeRecord) -> None:
    assert make_record(median_ms=1.25).speedup == 2.0


@pytest.mark.parametrize("name", ["problem", "target", "schedule", "measurement", "default_measurement", "versions"])
def test_a_record_without_a_field_is_refused(name: str, make_record: MakeRecord) -> None:
    values = make_record().to_dict()
    del values[name]
    with pytest.raises(KeyError, match=name):
        TuningRecord.from_dict(values)


def test_a_record_with_an_unknown_field_inside_is_refused(make_record: MakeRecord) -> None:
    values = make_record().to_dict()
    values["problem"]["colour"] = "red"
    with pytest.raises(InvalidArgument, match=r"Problem has unknown fields \['colour'\]"):
        TuningRecord.from_dict(values)
