from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest

from hsa_compile.problem import Problem
from hsa_compile.schedules.key import ScheduleKey
from hsa_compile.schedules.record import TuningRecord
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import Target

MATCHES = {spec.name: spec.metadata["match"] for spec in fields(ScheduleKey)}
WEIGHTS = {spec.name: spec.metadata.get("weight") for spec in fields(ScheduleKey)}

# Another problem or target that differs from the fixtures' in this field of the key, and in no other.
OTHER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "op": ({"op": "hsa_backward"}, {}),
    "kind": ({}, {"kind": "hip"}),
    "device": ({}, {"name": "Another GPU"}),
    "arch": ({}, {"arch": "sm_80"}),
    "backend": ({}, {"has_compiler": False}),
    "dtype": ({"dtype": "float16"}, {}),
    "head_dim": ({"head_dim": 128, "value_dim": 64}, {}),
    "value_dim": ({"value_dim": 128}, {}),
    "chunk_size": ({"chunk_size": 32}, {}),
    "landmarks_per_chunk": ({"landmarks_per_chunk": 4}, {}),
    "group": ({"num_heads": 16}, {}),
    "deterministic": ({"deterministic": True}, {}),
    "seq_len": ({"seq_len": 16384, "kv_len": 4096}, {}),
    "kv_len": ({"kv_len": 16384}, {}),
    "top_k": ({"top_k": 32}, {}),
    "batch": ({"batch": 4}, {}),
    "num_kv_heads": ({"num_heads": 32, "num_kv_heads": 8}, {}),
    "num_cores": ({}, {"num_cores": 4 * 132}),
    "softmax_off_by_one": ({"softmax_off_by_one": True}, {}),
    "per_head_weights": ({"per_head_weights": True}, {}),
    "mask_last_token": ({"mask_last_token": True}, {}),
    "packed": ({"packed": True}, {}),
    "stick_breaking": ({"fusion": "stick_breaking"}, {}),
    "paged": ({"paged": True}, {}),
    "noise": ({"noise": True}, {}),
}

MakeProblem = Callable[..., Problem]
MakeRecord = Callable[..., TuningRecord]


@pytest.fixture
def base(name: str, gpu: Target, cpu: Target) -> Target:
    """The target that `OTHER[name]` changes: one with a choice of templates where that is what changes."""
    return replace(cpu, has_compiler=True) if name == "backend" else gpu


def named(match: str) -> list[str]:
    return [name for name, value in MATCHES.items() if value == match]


def test_every_field_says_how_it_matches_and_why() -> None:
    for spec in fields(ScheduleKey):
        assert spec.metadata["match"] in {"exact", "near", "recorded"}, spec.name
        assert len(spec.metadata["reason"]) > 5, spec.name
    assert set(OTHER) == set(named("exact")) - {"kernel_source"} | set(named("near"))


@pytest.mark.parametrize("name", OTHER)
def test_each_field_of_the_key_comes_from_the_problem_or_target(
    name: str, base: Target, make_problem: MakeProblem
) -> None:
    problem, target = OTHER[name]
    key, other = ScheduleKey.of(make_problem(), base), ScheduleKey.of(make_problem(**problem), replace(base, **target))
    differing = {spec.name for spec in fields(key) if getattr(key, spec.name) != getattr(other, spec.name)}
    assert differing - {"kernel_source"} == {name}
    assert key != other


@pytest.mark.parametrize("name", [name for name in named("exact") if name != "kernel_source"])
def test_an_entry_that_differs_in_a_field_that_must_match_does_not_serve(
    name: str, base: Target, make_problem: MakeProblem, make_record: MakeRecord, open_cache: Callable[..., Any]
) -> None:
    problem, target = OTHER[name]
    cache = open_cache()
    # A dataflow that stays valid in all the others, so that nothing but the key can refuse it.
    anywhere = Schedule.of("token", num_warps=4, num_stages=2) if base.kind == "cuda" else None
    cache.put(make_record(make_problem(), base, anywhere))
    other, elsewhere = make_problem(**problem), replace(base, **target)
    assert cache.lookup(make_problem(), base) is not None
    assert cache.lookup(other, elsewhere) is None
    assert ScheduleKey.of(make_problem(), base).mismatches(ScheduleKey.of(other, elsewhere)) == [name]
    assert cache.explain_miss(other, elsewhere).endswith(f": {name}")


def test_an_entry_tuned_for_another_kernel_text_does_not_serve(
    cpu: Target, make_problem: MakeProblem, make_record: MakeRecord, open_cache: Callable[..., Any]
) -> None:
    cache = open_cache()
    cache.put(make_record(kernel_source="0123456789ab"))
    assert cache.lookup(make_problem(), cpu) is None
    assert cache.explain_miss(make_problem(), cpu).endswith(": kernel_source")


@pytest.mark.parametrize("name", named("near"))
def test_an_entry_that_differs_in_a_near_field_serves_at_its_weighted_distance(
    name: str, gpu: Target, make_problem: MakeProblem, make_record: MakeRecord, open_cache: Callable[..., Any]
) -> None:
    problem, target = OTHER[name]
    cache = open_cache()
    cache.put(make_record(make_problem(), gpu))
    other, elsewhere = make_problem(**problem), replace(gpu, **target)
    found = cache.lookup(other, elsewhere)
    steps = 1 if isinstance(next(iter({**problem, **target}.values())), bool | str) else 2  # numbers differ fourfold
    assert found is not None
    assert found.distance == pytest.approx(steps * WEIGHTS[name])
    there, back = ScheduleKey.of(make_problem(), gpu), ScheduleKey.of(other, elsewhere)
    assert there.distance(back) == back.distance(there)


@pytest.mark.parametrize("name", named("recorded"))
def test_a_recorded_field_matches_anything(name: str, cpu: Target, make_problem: MakeProblem) -> None:
    old = ScheduleKey.of(make_problem(), cpu, {name: "1.0"})
    new = ScheduleKey.of(make_problem(), cpu, {name: "9.9"})
    assert getattr(old, name) == "1.0"
    assert old == new
    assert hash(old) == hash(new)
    assert not old.mismatches(new)
    assert old.distance(new) == 0


def test_lengths_of_one_bucket_share_a_key(cpu: Target, make_problem: MakeProblem) -> None:
    keys = {ScheduleKey.of(make_problem(seq_len=n), cpu) for n in (2049, 3000, 4096)}
    assert len(keys) == 1


def test_on_a_cpu_a_deterministic_problem_shares_the_key_of_a_free_one(cpu: Target, make_problem: MakeProblem) -> None:
    assert ScheduleKey.of(make_problem(deterministic=True), cpu) == ScheduleKey.of(make_problem(), cpu)
