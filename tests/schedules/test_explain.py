from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from hsa_compile.problem import Problem
from hsa_compile.schedules.cache import ScheduleCache
from hsa_compile.schedules.explain import explain
from hsa_compile.schedules.lookup import RegretBin, RegretTable
from hsa_compile.schedules.record import TuningRecord
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import default_schedule
from hsa_compile.target import Target

MakeProblem = Callable[..., Problem]
MakeRecord = Callable[..., TuningRecord]
OpenCache = Callable[..., ScheduleCache]

TOKEN_1, TOKEN_4, TOKEN_16 = (Schedule.of("token", block_tokens=block) for block in (1, 4, 16))


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    bins = tuple(
        RegretBin(up_to=up_to, pairs=6, mean=mean, p90=2 * mean, default_mean=0.5)
        for up_to, mean in ((2.0, 0.03), (4.0, 0.07))
    )
    table = RegretTable(device="Some CPU", shapes=4, bins=bins)
    for module in ("lookup", "explain"):
        monkeypatch.setattr(
            f"hsa_compile.schedules.{module}.regret_table", lambda kind: table if kind == "cpu" else None
        )


def test_without_entries_it_is_the_default(open_cache: OpenCache, make_problem: MakeProblem, cpu: Target) -> None:
    told = explain(open_cache(), make_problem(), cpu)
    assert (told.how, told.found, told.rivals) == ("default", None, ())
    assert told.schedule == default_schedule(make_problem(), cpu)
    assert told.loss.startswith("not known")


def test_an_exact_entry_loses_nothing_and_the_others_are_farther_away(
    open_cache: OpenCache, make_problem: MakeProblem, make_record: MakeRecord, cpu: Target
) -> None:
    cache = open_cache()
    cache.put(make_record(schedule=TOKEN_4))
    cache.put(make_record(seq_len=8192, schedule=TOKEN_1))
    told = explain(cache, make_problem(), cpu)
    assert (told.how, told.schedule, told.differences) == ("exact", TOKEN_4, ())
    assert told.loss.startswith("none")
    assert [rival.why for rival in told.rivals] == ["farther away, 1.50 rather than 0.00"]


@pytest.mark.parametrize(
    ("fields", "loss"),
    [
        ({"trials": 3, "failures": {"WrongResult": 1}}, "not known: only 2 of"),
        ({"complete": False}, "not known: its search is not finished after 12 candidates"),
    ],
)
def test_an_exact_entry_of_half_a_search_promises_nothing(
    open_cache: OpenCache, make_problem: MakeProblem, make_record: MakeRecord, cpu: Target,
    fields: dict[str, Any], loss: str,
) -> None:  # fmt: skip
    cache = open_cache()
    cache.put(replace(make_record(schedule=TOKEN_4), **fields))
    assert explain(cache, make_problem(), cpu).loss.startswith(loss)


def test_the_nearest_entry_tells_each_difference_and_the_measured_loss(
    open_cache: OpenCache, make_problem: MakeProblem, make_record: MakeRecord, cpu: Target
) -> None:
    cache = open_cache()
    cache.put(make_record(seq_len=8192, top_k=16, schedule=TOKEN_4))
    told = explain(cache, make_problem(), cpu)
    assert told.how == "nearest"
    assert [str(difference) for difference in told.differences] == [
        "seq_len 8192, here 4096 (distance 1.00)",
        "kv_len 8192, here 4096 (distance 0.50)",
        "top_k 16, here 8 (distance 1.00)",
    ]
    assert told.loss == (
        "7.0% on average, at most 14.0% for nine of ten; the default schedule 50.0% (6 pairs of shapes on Some CPU)"
    )
    far = explain(cache, make_problem(seq_len=1 << 20), cpu)
    assert far.loss == "not known: shapes were measured against each other up to distance 4"


def test_why_no_other_entry_serves(
    open_cache: OpenCache, make_problem: MakeProblem, make_record: MakeRecord, cpu: Target
) -> None:
    cache = open_cache()
    open_cache(user="pretuned").put(make_record(seq_len=2048, schedule=TOKEN_1))
    cache.put(make_record(dtype="float32", head_dim=128))
    cache.put(make_record(chunk_size=32))
    cache.put(make_record(kind="predicted"))
    cache.put(make_record(seq_len=8192, schedule=Schedule.of("diagonal", width=3)))
    cache.put(make_record(seq_len=8192, batch=4, schedule=TOKEN_4))
    cache = open_cache()
    told = explain(cache, make_problem(), cpu)
    assert told.found is not None
    assert (told.found.origin, told.found.distance) == ("pretuned", 1.5)
    assert [rival.why.split(":")[0] for rival in told.rivals] == [
        "its schedule cannot run this problem",
        "farther away, 2.50 rather than 1.50",
        "predicted, and a measured entry serves",
        "must match",
        "must match",
    ]
    *_, one, two = told.rivals
    assert one.why == "must match: chunk_size"
    assert two.why == "must match: dtype, head_dim, value_dim"
    assert [str(d) for d in two.differences if d.distance is None][:2] == [
        "dtype float32, here bfloat16 (must match)",
        "head_dim 128, here 64 (must match)",
    ]


def test_an_entry_of_another_device_or_kind_of_device_has_no_known_loss(
    open_cache: OpenCache, make_problem: MakeProblem, make_record: MakeRecord, gpu: Target
) -> None:
    cache = open_cache()
    cache.put(make_record(target=gpu, seq_len=8192))
    told = explain(cache, make_problem(), gpu)
    assert told.loss == "not known: no shapes were measured against each other on a cuda device"
    other = Target(**{**gpu.to_dict(), "name": "Another GPU"})
    assert explain(cache, make_problem(seq_len=8192), other).loss == "not known: it was measured on Test GPU"
