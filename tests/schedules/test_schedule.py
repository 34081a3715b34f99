from typing import Any

import pytest

from hsa_compile.errors import InvalidSchedule
from hsa_compile.schedules.schedule import Schedule

SCHEDULES = [
    Schedule.of("token"),
    Schedule.of("token", block_tokens=16),
    Schedule.of("chunk", num_warps=8, block_tokens=4, order="spread", depth=-1),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_dict_gives_back_the_same_schedule(schedule: Schedule) -> None:
    assert Schedule.from_dict(dict(schedule)) == schedule


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_printed_text_gives_back_the_same_schedule(schedule: Schedule) -> None:
    assert Schedule.parse(str(schedule)) == schedule


def test_schedules_with_the_same_knobs_are_equal_and_hash_alike_in_any_order() -> None:
    one, other = Schedule.of("chunk", a=1, b=2), Schedule.of("chunk", b=2, a=1)
    assert one == other
    assert hash(one) == hash(other)
    assert str(one) == str(other) == "chunk a=1 b=2"
    assert len({one, other, Schedule.of("token", a=1, b=2), Schedule.of("chunk", a=1, b=3)}) == 3


def test_a_schedule_reads_like_a_mapping_with_the_dataflow_first() -> None:
    schedule = Schedule.of("chunk", num_warps=8, block_tokens=4)
    assert list(schedule) == ["dataflow", "block_tokens", "num_warps"]
    assert dict(schedule) == {"dataflow": "chunk", "block_tokens": 4, "num_warps": 8}
    assert len(schedule) == 3
    assert "num_warps" in schedule
    assert "segment" not in schedule
    assert schedule.get("segment") is None
    with pytest.raises(KeyError, match="segment"):
        schedule["segment"]


def test_a_schedule_cannot_be_changed() -> None:
    schedule = Schedule.of("token", block_tokens=16)
    with pytest.raises(AttributeError):
        schedule.dataflow = "chunk"  # type: ignore[misc]
    with pytest.raises(TypeError):
        schedule["block_tokens"] = 4  # type: ignore[index]


@pytest.mark.parametrize(
    "text",
    [
        "token block_tokens",
        "token =4",
        "token block_tokens=",
        "chunk dataflow=token",
        "token block_tokens=1 block_tokens=4",
    ],
)
def test_a_text_that_is_no_schedule_is_refused_with_the_word_that_is_wrong(text: str) -> None:
    with pytest.raises(InvalidSchedule) as caught:
        Schedule.parse(text)
    assert text.split()[1].split("=")[0] in str(caught.value)


@pytest.mark.parametrize("value", ["²", "٣", "1.5", "-", "--1", "9" * 5000])
def test_what_only_looks_like_a_number_stays_a_word(value: str) -> None:
    assert Schedule.parse(f"token block_tokens={value}")["block_tokens"] == value


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"block_tokens": 4}, "dataflow = None"),
        ({"dataflow": 3}, "dataflow = 3"),
        ({"dataflow": "token", "block_tokens": 1.5}, "block_tokens = 1.5"),
        ({"dataflow": "token", "block_tokens": None}, "block_tokens = None"),
        ({"dataflow": "token", "block_tokens": [4]}, r"block_tokens = \[4\]"),
    ],
)
def test_a_mapping_that_is_no_schedule_is_refused_with_the_value(values: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidSchedule, match=named):
        Schedule.from_dict(values)


def test_a_knob_given_twice_is_refused() -> None:
    with pytest.raises(InvalidSchedule, match="once each"):
        Schedule(dataflow="token", knobs=(("block_tokens", 1), ("block_tokens", 4)))
