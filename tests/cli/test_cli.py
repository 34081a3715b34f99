"""The command line as a person meets it: exit code, standard output, standard error."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from shell import SHAPE, Shell, record_of

from hsa_compile.autotune.tune import tune as tune_problem
from hsa_compile.cli.main import cli
from hsa_compile.problem import OPS, Problem
from hsa_compile.schedules.cache import ScheduleCache, default_cache
from hsa_compile.schedules.record import TuningRecord
from hsa_compile.target import NAMED_TARGETS, Target

TUNE = ["tune", *SHAPE, "--op", "attention", "--device", "cpu", "--trials", "5", "--timeout", "600", "--in-process"]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")


@pytest.fixture
def no_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    def tune(*_: object, **__: object) -> TuningRecord:
        raise AssertionError("nothing may be tuned here")

    monkeypatch.setattr("hsa_compile.autotune.tune.tune", tune)


# --- tune


def test_tune_prints_a_table_and_stores_measured_entries_for_both_ops(run: Shell) -> None:
    tuned = run(*TUNE)
    assert tuned.code == 0
    assert "B1 T128 HQ4 H1 D16 C16 K2 float32" in tuned.out
    assert tuned.out.split()[:3] == ["problem", "time", "gain"]
    assert "gain     the default schedule's time over that of this one" in tuned.out
    assert "Traceback" not in tuned.err
    listed = run("schedules", "list", "--json")
    assert listed.code == 0
    assert [entry["problem"]["op"] for entry in listed.json] == list(OPS)
    for entry in listed.json:
        assert (entry["kind"], entry["origin"]) == ("measured", "user")
        assert entry["measurement"]["median_ms"] > 0
        assert entry["default_measurement"]["median_ms"] > 0
        assert entry["target"] == Target.parse("cpu").to_dict()
        assert entry["inputs"] == "random"


def test_a_second_tune_says_that_it_is_cached_and_times_nothing(run: Shell, request: pytest.FixtureRequest) -> None:
    tuned = run(*TUNE)
    request.getfixturevalue("no_tuning")
    again = run(*TUNE)
    assert again.code == 0
    assert again.err.count("cached (--force tunes again)") == 2
    assert again.out == tuned.out


@pytest.mark.usefixtures("stored")
def test_force_tunes_again(run: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spy(problem: Problem, *rest: Any, **options: Any) -> TuningRecord:
        calls.append(problem.op)
        return tune_problem(problem, *rest, **options)

    monkeypatch.setattr("hsa_compile.autotune.tune.tune", spy)
    again = run(*TUNE, "--force")
    assert again.code == 0
    assert "cached" not in again.err
    assert calls == list(OPS)


@pytest.mark.usefixtures("stored")
def test_only_what_is_not_cached_is_tuned(run: Shell) -> None:
    more = run(*TUNE, "--top-k", "2,4", "--trials", "1", "--json")
    assert [(record["problem"]["top_k"], record["cached"]) for record in more.json] == [
        (2, True), (2, True), (4, False), (4, False)
    ]  # fmt: skip


def test_several_values_make_a_row_each_with_what_the_choice_costs(run: Shell) -> None:
    outcome = run(*TUNE, "--chunk-size", "16,32", "--top-k", "1,2", "--op", "forward", "--trials", "1")
    assert outcome.code == 0
    header, _, *rows = outcome.out.strip().splitlines()[:6]
    assert len(rows) == 4
    assert [" ".join(row.split()[5:7]) for row in rows] == ["C16 K1", "C16 K2", "C32 K1", "C32 K2"]
    assert header.split()[-1] == "cost"
    assert "backward" not in header
    assert "cost         the sum over the least sum of this table" in outcome.out
    costs = [float(row.split()[-1]) for row in rows]
    assert min(costs) == 1.0
    totals = [float(row.split()[-3]) for row in rows]
    assert costs == pytest.approx([total / min(totals) for total in totals], rel=0.02)


def test_json_is_alone_on_standard_output(run: Shell) -> None:
    outcome = run(*TUNE, "--json", "--inputs", "local", "--trials", "1")
    assert outcome.code == 0
    assert [record["problem"]["op"] for record in outcome.json] == list(OPS)
    for record in outcome.json:
        assert record["cached"] is False
        assert record["inputs"] == "local"
        assert record["trials"] == 1
        assert record["measurement"]["median_ms"] > 0
        assert TuningRecord.from_dict(record).problem.seq_len == 128


def test_short_forms_of_lengths_and_dtypes_are_understood(run: Shell) -> None:
    arguments = [*TUNE, "--seq-len", "1k", "--dtype", "bf16, fp32", "--op", "forward", "--trials", "1", "--json"]
    problems = [record["problem"] for record in run(*arguments).json]
    assert [(problem["seq_len"], problem["dtype"]) for problem in problems] == [(1024, "bfloat16"), (1024, "float32")]


def test_a_shape_without_a_whole_chunk_is_tuned_too(run: Shell) -> None:
    assert run(*TUNE, "--seq-len", "9", "--op", "all").code == 0


def test_ctrl_c_keeps_what_was_finished(run: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(problem: Problem, *rest: Any, **options: Any) -> TuningRecord:
        if problem.op == OPS[1]:
            raise KeyboardInterrupt
        return tune_problem(problem, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr("hsa_compile.autotune.tune.tune", interrupted)
        outcome = run(*TUNE)
    assert outcome.code == 130
    assert outcome.out == ""
    assert outcome.err.splitlines()[-1].startswith("error: interrupted; what was finished is stored")
    assert "Traceback" not in outcome.err
    assert [entry["problem"]["op"] for entry in run("schedules", "list", "--json").json] == [OPS[0]]


def test_a_cache_that_cannot_be_written_fails_in_one_line(
    run: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / "schedules").write_text("a file where the directory should be")
    outcome = run(*TUNE)
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1].startswith(f"error: journal {tmp_path}/cache/schedules/")
    assert "Traceback" not in outcome.err


# --- emit


@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize("target", ["cpu", *NAMED_TARGETS])
def test_emit_prints_the_source_of_a_kernel_for_any_target(target: str, op: str, run: Shell) -> None:
    outcome = run("emit", "--target", target, "--op", op)
    assert (outcome.code, outcome.err) == (0, "")
    module = ast.parse(outcome.out)
    assert f"hsa_{op}" in {node.name for node in module.body if isinstance(node, ast.FunctionDef)}
    assert ("import triton" in outcome.out) == (target != "cpu")


def test_emit_prints_equal_kernels_once(run: Shell) -> None:
    flags = ["emit", "--target", "sm_90", "--schedule", "token num_warps=4 num_stages=2", "--head-dim"]
    one, other = run(*flags, "64", "--seq-len", "1k").out, run(*flags, "128").out
    assert run(*flags, "64,128", "--seq-len", "1k,2k").out == one + other


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("op", ["forward", "backward", "decode"])
def test_emit_prints_cpp_for_a_cpu_with_a_compiler(op: str, run: Shell) -> None:
    outcome = run("emit", "--target", "cpu", "--op", op)
    assert (outcome.code, outcome.err) == (0, "")
    assert "#include" in outcome.out
    assert f"hsa_{op}(" in outcome.out


@pytest.mark.parametrize(
    ("target", "schedule"), [("cpu", "token block_tokens=4"), ("gfx942", "token num_warps=4 num_stages=1")]
)
def test_emit_follows_the_schedule_it_is_given(target: str, schedule: str, run: Shell) -> None:
    outcome = run("emit", "--target", target, *SHAPE, "--schedule", schedule)
    assert (outcome.code, outcome.err) == (0, "")
    words = schedule.split()
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("schedule  ")]
    assert sorted(line.split()[1:]) == sorted(words)


@pytest.mark.usefixtures("stored")
def test_emit_prints_the_tuned_schedule_where_there_is_one(run: Shell) -> None:
    outcome = run("emit", "--target", "cpu", *SHAPE)
    assert "\nschedule  token block_tokens=4\n" in outcome.out
    assert "\nschedule  token block_tokens=4\n" not in run("emit", "--target", "cpu", *SHAPE, "--head-dim", "32").out


# --- doctor


def test_doctor_says_what_works_one_line_each(run: Shell) -> None:
    outcome = run("doctor")
    assert (outcome.code, outcome.err) == (0, "")
    for word in ("python", "torch", "triton", "cpu", "c++", "gpu", "emit", "cache", "0 tuned schedules"):
        assert word in outcome.out
    findings = run("doctor", "--json").json
    assert [finding["name"] for finding in findings] == [line[4:].split()[0] for line in outcome.out.splitlines()]
    assert all(set(finding) == {"name", "ok", "text"} for finding in findings)


def test_doctor_counts_ones_own_schedules_apart_from_those_of_the_package(run: Shell, tmp_path: Path) -> None:
    package = ScheduleCache(tmp_path / "pretuned")
    for op in ("hsa_forward", "hsa_backward"):
        package.put(record_of(op))
    default_cache().put(record_of("hsa_forward"))
    assert "1 tuned schedule, 2 from the package" in run("doctor").out


@pytest.mark.usefixtures("stored")
@pytest.mark.filterwarnings("ignore::hsa_compile.errors.CacheWarning")
def test_doctor_names_a_damaged_cache_file(run: Shell) -> None:
    path = Path(run("schedules", "path", "--device", "cpu").out.strip())
    path.write_text("broken")
    outcome = run("doctor")
    assert outcome.code == 0
    (line,) = [line for line in outcome.out.splitlines() if str(path) in line]
    assert line.startswith("--")


def test_doctor_names_a_cache_that_cannot_be_written(
    run: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HSA_COMPILE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    outcome = run("doctor")
    assert outcome.code == 0
    assert f"{tmp_path / 'file' / 'cache'} cannot be written" in outcome.out


# --- wrong input

# arguments, what the message must show of the input, what it must show of what is allowed
BAD_INPUTS: list[tuple[list[str], str, str]] = [
    (["tune", "--device", "cpu", "--seq-len", "2048m", "--batch", "1024"], "T2147483648", "GiB free"),
    (["banana"], "'banana'", "tune, plan, report, schedules, emit, inspect"),
    (["--banana"], "'--banana'", "--help"),
    (["tune", "--banana"], "'--banana'", "--seq-len"),
    (["tune", "banana"], "(banana)", "--seq-len"),
    (["schedules", "banana"], "'banana'", "list, show, path, clear, explain, diff, export, import"),
    (["schedules", "show"], "NUMBER", ""),
    (["schedules", "show", "banana"], "'banana'", "integer"),
    (["schedules", "show", "7"], "entry 7", "there are 0"),
    (["schedules", "path", "--device", "banana"], "'banana'", "auto, cpu, cuda"),
    (["schedules", "clear", "--yes", "--device", "banana"], "'banana'", "auto, cpu, cuda"),
    (["doctor", "--banana"], "'--banana'", "--json"),
    (["tune", "--device", "banana"], "'banana'", "auto, cpu, cuda"),
    (["tune", "--device", "mps"], "'mps'", "auto, cpu, cuda"),
    (["tune", "--device", ""], "''", "auto, cpu, cuda"),
    (["tune", "--device", "sm_90"], "'sm_90'", "auto, cpu, cuda"),
    (["tune", "--device", "gfx942"], "'gfx942'", "auto, cpu, cuda"),
    (["tune", "--op", "sideways"], "'sideways'", "'forward', 'backward', 'attention', 'select', 'all'"),
    (["tune", "--seq-len"], "--seq-len", "argument"),
    (["tune", "--seq-len", ""], "''", "positive integer"),
    (["tune", "--seq-len", "0"], "'0'", "positive integer"),
    (["tune", "--seq-len", "-5"], "'-5'", "positive integer"),
    (["tune", "--seq-len", "1.5"], "'1.5'", "positive integer"),
    (["tune", "--seq-len", "4x"], "'4x'", "positive integer"),
    (["tune", "--seq-len", "k"], "'k'", "positive integer"),
    (["tune", "--seq-len", "²"], "'²'", "positive integer"),
    (["tune", "--seq-len", "128,,256"], "''", "positive integer"),
    (["tune", "--seq-len", "9" * 5000], "'999", "positive integer"),
    (["tune", "--seq-len", "2000000m"], "seq_len = 2097152000000", f"1 … {2**40}"),
    (["tune", "--batch", "0"], "'0'", "positive integer"),
    (["tune", "--heads", "6", "--kv-heads", "4"], "num_heads = 6", "multiple of num_kv_heads = 4"),
    (["tune", "--head-dim", "257"], "head_dim = 257", "1 … 256"),
    (["tune", "--chunk-size", "2048"], "chunk_size = 2048", "1 … 1024"),
    (["tune", "--top-k", "none"], "'none'", "positive integer"),
    (["tune", "--dtype", "int8"], "'int8'", "float32, bfloat16, float16, float64"),
    (["tune", "--dtype", "fp32,"], "''", "float32, bfloat16, float16, float64"),
    (["tune", "--inputs", "odd"], "'odd'", "random, local, hot, trained"),
    (["tune", "--trials", "0"], "0", "x>=1"),
    (["tune", "--trials", "many"], "'many'", "integer"),
    (["tune", "--timeout", "0"], "0.0", "x>0"),
    (["tune", "--timeout", "-3"], "-3.0", "x>0"),
    (["tune", "--timeout", "nan"], "'nan'", "a finite number"),
    (["tune", "--timeout", "soon"], "'soon'", "float"),
    (["tune", "--seed", "-1"], "-1", "0<=x"),
    (["tune", "--device", "cpu", "--storage", "banana"], "'banana'", "postgresql://…, mysql://…"),
    (["tune", "--device", "cpu", "--storage", "redis://host"], "'redis://host'", "FILE.journal"),
    (["tune", "--sampler", "psychic"], "'psychic'", "'ours', 'tpe', 'random'"),
    (["tune", "--until-within", "banana"], "'banana'", "between 0 and 100"),
    (["tune", "--until-within", "0"], "'0'", "between 0 and 100"),
    (["tune", "--workers", "0"], "0", "x>=1"),
    (["tune", "--workers", "2", "--in-process"], "workers = 2", "isolation"),
    (["plan", "--trials", "0"], "0", "x>=1"),
    (["report", "--storage", "nowhere.journal"], "nowhere.journal", "hsa-compile tune"),
    (["tune", "--seed", "99999999999"], "99999999999", "x<=4294967295"),
    (["emit", "--target", "banana"], "'banana'", "sm_80, sm_90, sm_100, gfx942"),
    (["emit", "--target", "sm_90", "--dtype", "float64"], "'float64'", "use the CPU"),
    (["emit", "--target", "gfx942", "--op", "backward", "--dtype", "fp64"], "'float64'", "use the CPU"),
    (["emit", "--target", "cpu", "--schedule", ""], "''", "chunk, token"),
    (["emit", "--target", "cpu", "--schedule", "banana"], "'banana'", "chunk, token"),
    (["emit", "--target", "cpu", "--schedule", "token"], "none", "block_tokens"),
    (["emit", "--target", "cpu", "--schedule", "token block_tokens"], "'block_tokens'", "name=value"),
    (["emit", "--target", "cpu", "--schedule", "token block_tokens=3"], "block_tokens = 3", "1, 4, 16"),
    (["emit", "--target", "cpu", "--schedule", "token block_tokens=²"], "'²'", "1, 4, 16"),
    (
        ["emit", "--target", "cpu", "--schedule", "token block_tokens=1 block_tokens=4"],
        "'block_tokens', 'block_tokens'",
        "once each",
    ),
    (["emit", "--target", "cpu", "--schedule", "token dataflow=chunk"], "'dataflow'", "apart"),
    (["emit", "--target", "cpu", "--schedule", "token colour=red"], "colour", "block_tokens"),
    (["emit", "--target", "sm_90", "--schedule", "token block_tokens=4"], "block_tokens", "num_warps"),
]
NO_GPU_INPUTS = [
    (["tune", "--device", "cuda:0"], "'cuda:0' is not present", "use cpu"),
    (["schedules", "path", "--device", "cuda:0"], "'cuda:0' is not present", "use cpu"),
    (["emit", "--target", "cuda:0"], "'cuda:0' is not present", "use cpu"),
]


def assert_refused_in_one_line(run: Shell, arguments: list[str], shown: str, allowed: str) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: ")
    assert shown in line
    assert allowed in line


@pytest.mark.usefixtures("no_tuning")
@pytest.mark.parametrize(
    ("arguments", "shown", "allowed"), BAD_INPUTS, ids=[" ".join(case[0])[:60] for case in BAD_INPUTS]
)
def test_wrong_input_is_refused_in_one_line_with_the_value_and_what_is_allowed(
    arguments: list[str], shown: str, allowed: str, run: Shell
) -> None:
    assert_refused_in_one_line(run, arguments, shown, allowed)


@without_gpu
@pytest.mark.usefixtures("no_tuning")
@pytest.mark.parametrize(
    ("arguments", "shown", "allowed"), NO_GPU_INPUTS, ids=[" ".join(case[0]) for case in NO_GPU_INPUTS]
)
def test_a_gpu_that_is_not_there_is_refused_in_one_line(
    arguments: list[str], shown: str, allowed: str, run: Shell
) -> None:
    assert_refused_in_one_line(run, arguments, shown, allowed)


# --- help


def all_commands(group: click.Group, *path: str) -> dict[tuple[str, ...], click.Command]:
    found: dict[tuple[str, ...], click.Command] = {}
    context = click.Context(group)
    for name in group.commands:
        _, command, _ = group.resolve_command(context, [name])
        assert command is not None
        if isinstance(command, click.Group):
            found |= all_commands(command, *path, name)
        else:
            found[(*path, name)] = command
    return found


COMMANDS = all_commands(cli)


def test_the_commands_are_the_documented_ones() -> None:
    assert {" ".join(path) for path in COMMANDS} == {
        "tune", "plan", "report", "schedules list", "schedules show", "schedules path", "schedules clear",
        "schedules explain",
        "schedules diff", "schedules export", "schedules import", "emit", "inspect", "doctor",
        "model info", "prepare", "train", "eval", "generate", "bench", "profile",
    }  # fmt: skip


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example_of_itself(path: tuple[str, ...], flag: str, run: Shell) -> None:
    outcome = run(*path, flag)
    assert (outcome.code, outcome.err) == (0, "")
    assert "Example" in outcome.out
    examples = outcome.out[outcome.out.index("Example") :].split("Options:")[0]
    assert f"hsa-compile {' '.join(path)}" in examples
    for parameter in COMMANDS[path].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


@pytest.mark.parametrize("path", [(), ("schedules",)], ids=["hsa-compile", "schedules"])
def test_a_group_lists_its_commands_in_its_help(path: tuple[str, ...], run: Shell) -> None:
    outcome = run(*path, "--help")
    assert outcome.code == 0
    names = {full[len(path)] for full in COMMANDS if full[: len(path)] == path}
    assert all(name in outcome.out for name in names)


@pytest.mark.slow
def test_the_package_runs_as_a_module_and_tells_its_version() -> None:
    result = subprocess.run([sys.executable, "-m", "hsa_compile", "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "hsa-compile, version " in result.stdout
