import itertools
from dataclasses import replace

import pytest

from hsa_compile.problem import DTYPES, OPS, Problem
from hsa_compile.schedules.ops import backend_for
from hsa_compile.schedules.schedule import Knob, Schedule
from hsa_compile.schedules.space import SearchSpace, default_schedule
from hsa_compile.target import NAMED_TARGETS, Target

CPU = Target(kind="cpu", name="test", arch="avx2", num_cores=2)
COMPILED = {f"cpu-{arch}": replace(CPU, arch=arch, has_compiler=True) for arch in ("avx2", "avx512", "scalar")}
TARGETS = {"cpu": CPU, **COMPILED, **NAMED_TARGETS}

both_ops = pytest.mark.parametrize("op", OPS)
any_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


def problem_of(op: str = "hsa_forward", *, group: int = 4, **fields: object) -> Problem:
    shape = {"seq_len": 4096, "num_heads": group, "num_kv_heads": 1, "head_dim": 64, "top_k": 8, "dtype": "float32"}
    return Problem(op=op, **{**shape, **fields})  # type: ignore[arg-type]


def every_point(space: SearchSpace) -> list[Schedule]:
    return [
        Schedule.of(dataflow, **dict(zip(knobs, values, strict=True)))
        for dataflow, knobs in space.choices.items()
        for values in itertools.product(*knobs.values())
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_kind_of_device_has_its_template(dtype: str) -> None:
    problem = problem_of(dtype=dtype)
    assert {backend_for(problem, target) for target in NAMED_TARGETS.values()} == {"triton"}
    assert backend_for(problem, CPU) == "torch"
    compiled = {backend_for(problem, target) for target in COMPILED.values()}
    assert compiled == ({"cpp"} if dtype in ("float32", "bfloat16") else {"torch"})


SHAPES = list(itertools.product(OPS, (1, 3, 16, 64), (1, 7, 4096), (False, True)))


@any_target
@pytest.mark.parametrize(
    ("op", "group", "seq_len", "deterministic"),
    [pytest.param(*shape, marks=[pytest.mark.exhaustive] * (n % 13 > 0)) for n, shape in enumerate(SHAPES)],
)
def test_schedules_are_distinct_valid_and_all_that_are_valid(
    target: Target, op: str, group: int, seq_len: int, deterministic: bool
) -> None:
    problem = problem_of(op, group=group, seq_len=seq_len, deterministic=deterministic)
    space = SearchSpace.of(problem, target)
    listed = list(space.schedules())
    assert listed
    assert len(set(listed)) == len(listed)
    assert set(listed) == {point for point in every_point(space) if space.is_valid(point)}
    assert listed == list(space.schedules())


@any_target
@both_ops
def test_validity_and_reason_agree(op: str, target: Target) -> None:
    problem = problem_of(op, group=16, seq_len=600, deterministic=True)
    space = SearchSpace.of(problem, target)
    for point in every_point(space):
        reason = space.why_invalid(point)
        assert space.is_valid(point) == (reason is None)
        assert reason is None or (reason.strip() and "\n" not in reason)


def unknown_schedules(known: Schedule) -> list[tuple[Schedule, str]]:
    """Schedules that differ from a valid one in what no problem allows, and what the reason must name."""
    knob, value = known.knobs[0]
    rest: dict[str, Knob] = dict(known.knobs[1:])
    return [
        (Schedule(dataflow="diagonal", knobs=known.knobs), "'diagonal'"),
        (Schedule.of(known.dataflow, **rest), knob),
        (Schedule(dataflow=known.dataflow, knobs=(*known.knobs, ("colour", "red"))), "colour"),
        (Schedule.of(known.dataflow, **{**rest, knob: -7}), f"{knob} = -7"),
        (Schedule.of(known.dataflow, **{**rest, knob: f"{value}"}), f"{knob} = '{value}'"),
    ]


@any_target
@both_ops
def test_an_unknown_dataflow_knob_or_value_is_named(op: str, target: Target) -> None:
    problem = problem_of(op)
    space = SearchSpace.of(problem, target)
    for schedule, named in unknown_schedules(default_schedule(problem, target)):
        reason = space.why_invalid(schedule)
        assert reason is not None
        assert named in reason


@both_ops
def test_blocks_and_super_tiles_larger_than_the_sequence_are_refused(op: str) -> None:
    problem = problem_of(op, seq_len=5)
    space = SearchSpace.of(problem, CPU)
    largest = Schedule.of("token", block_tokens=max(space.choices["token"]["block_tokens"]))
    assert "5 tokens" in (space.why_invalid(largest) or "")
    tile = Schedule.of("chunk", **{knob: max(values) for knob, values in space.choices["chunk"].items()})  # type: ignore[type-var]
    assert "5 tokens" in (space.why_invalid(tile) or "")


@both_ops
def test_a_tile_holds_at_least_one_token_and_at_most_a_super_tile(op: str) -> None:
    space = SearchSpace.of(problem_of(op), CPU)
    rows, tokens = space.choices["chunk"]["tile_rows"], space.choices["chunk"]["super_tile"]
    too_small = Schedule.of("chunk", super_tile=tokens[0], tile_rows=rows[0])
    wide = problem_of(op, group=2 * int(rows[0]))
    assert str(wide.group) in (SearchSpace.of(wide, CPU).why_invalid(too_small) or "")
    too_large = Schedule.of("chunk", super_tile=tokens[0], tile_rows=rows[-1])
    assert "tile_rows" in (SearchSpace.of(problem_of(op, group=1), CPU).why_invalid(too_large) or "")


@both_ops
def test_a_register_tile_that_does_not_fit_the_registers_is_refused(op: str) -> None:
    target = COMPILED["cpu-avx2"]
    problem = problem_of(op, chunk_size=64, head_dim=64)
    space = SearchSpace.of(problem, target)
    smallest, *_, largest = sorted(space.choices["chunk"]["rows"])
    knobs: dict[str, Knob] = {knob: values[0] for knob, values in space.choices["chunk"].items()}
    assert space.is_valid(Schedule.of("chunk", **{**knobs, "rows": smallest}))
    reason = space.why_invalid(Schedule.of("chunk", **{**knobs, "rows": largest}))
    assert f"rows = {largest}" in (reason or "")


@both_ops
def test_a_block_that_gathers_too_many_bytes_is_refused_but_a_single_token_never(op: str) -> None:
    problem = problem_of(op, top_k=64, chunk_size=1024, head_dim=256)
    space = SearchSpace.of(problem, CPU)
    blocks = space.choices["token"]["block_tokens"]
    assert space.is_valid(Schedule.of("token", block_tokens=1))
    assert "gathers" in (space.why_invalid(Schedule.of("token", block_tokens=blocks[-1])) or "")


@both_ops
def test_what_does_not_fit_in_shared_memory_is_refused(op: str) -> None:
    problem, gpu = problem_of(op), NAMED_TARGETS["sm_90"]
    schedule = default_schedule(problem, gpu)
    small = replace(gpu, shared_memory=1024)
    reason = SearchSpace.of(problem, small).why_invalid(schedule)
    assert reason is not None
    assert "bytes of shared memory" in reason


@pytest.mark.parametrize("target", NAMED_TARGETS.values(), ids=NAMED_TARGETS)
@both_ops
def test_a_gpu_has_no_schedule_for_float64(op: str, target: Target) -> None:
    problem = problem_of(op, dtype="float64")
    assert not list(SearchSpace.of(problem, target).schedules())


@pytest.mark.parametrize("target", NAMED_TARGETS.values(), ids=NAMED_TARGETS)
@both_ops
def test_a_deterministic_problem_rules_out_atomics(op: str, target: Target) -> None:
    problem = problem_of(op, dtype="bfloat16")
    space = SearchSpace.of(problem, target)
    free = list(space.schedules())
    strict = list(SearchSpace.of(replace(problem, deterministic=True), target).schedules())
    deterministic = {"token", "union", "chunk"} | (
        {"fused"} if op == "hsa_forward" and target.kind == "cuda" else set()
    )
    assert {schedule.dataflow for schedule in strict} == deterministic
    assert deterministic <= {schedule.dataflow for schedule in free} <= set(space.choices)
    assert all("atomic" not in dict(schedule).values() for schedule in strict)


@both_ops
@pytest.mark.parametrize("target", [CPU, *COMPILED.values()], ids=["cpu", *COMPILED])
@pytest.mark.parametrize(
    ("group", "top_k"),
    [
        (3, 1),
        (64, 64),
        *(pytest.param(*x, marks=pytest.mark.exhaustive) for x in itertools.product((1, 3, 16, 64), (1, 8, 64))),
    ],
)
def test_fitting_a_schedule_of_a_longer_problem_gives_a_valid_one_on_a_cpu(
    op: str, target: Target, group: int, top_k: int
) -> None:
    for chunk_size, head_dim, seq_len in itertools.product((16, 128), (64, 256), (1, 7, 700, 16384)):
        long = problem_of(op, group=group, seq_len=1 << 20, top_k=1, chunk_size=chunk_size, head_dim=head_dim)
        short = replace(long, seq_len=seq_len, kv_len=0, top_k=top_k)
        space = SearchSpace.of(short, target)
        for schedule in SearchSpace.of(long, target).schedules():
            fitted = space.fit(schedule)
            assert space.why_invalid(fitted) is None, (schedule, fitted)
            assert fitted.dataflow == schedule.dataflow


@any_target
@both_ops
def test_fitting_to_the_same_problem_changes_nothing(op: str, target: Target) -> None:
    problem = problem_of(op)
    space = SearchSpace.of(problem, target)
    for schedule in space.schedules():
        assert space.fit(schedule) == schedule


@any_target
def test_fitting_a_schedule_that_this_version_does_not_know_leaves_it_to_be_refused(target: Target) -> None:
    problem = problem_of()
    space = SearchSpace.of(problem, target)
    for schedule, _ in unknown_schedules(default_schedule(problem, target)):
        fitted = space.fit(schedule)
        assert not space.is_valid(fitted)


def test_a_knob_of_another_type_is_refused_although_python_calls_it_equal() -> None:
    space = SearchSpace.of(Problem(seq_len=64, num_heads=2, num_kv_heads=2, head_dim=8, top_k=2, dtype="float64"), CPU)
    assert space.is_valid(Schedule.of("token", block_tokens=1))
    assert "block_tokens = True is not one of 1, 4" in (
        space.why_invalid(Schedule.of("token", block_tokens=True)) or ""
    )
