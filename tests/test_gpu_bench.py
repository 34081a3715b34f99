"""`benchmarks/gpu.py`, with a CPU in the GPU's place and, where that will do, one process in place of many."""

import importlib
import importlib.util
import itertools
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hsa_compile import Problem, Schedule, SearchSpace, Target
from hsa_compile.errors import WrongResult
from hsa_compile.kernels.emit import emit
from hsa_compile.schedules.cache import ScheduleCache
from hsa_compile.schedules.key import ScheduleKey
from hsa_compile.schedules.store import read_records
from hsa_compile.target import NAMED_TARGETS

_SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"
CPU = replace(Target.parse("cpu"), has_compiler=False)  # PyTorch's kernels, which nobody has to compile
H100 = NAMED_TARGETS["sm_90"]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_bench", _SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_bench"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


gpu = _load()
benches, correctness, kernels, lines, pool, race, smoke, tests, tuning = (
    importlib.import_module(f"gpu_parts.{name}")
    for name in ("benches", "correctness", "kernels", "lines", "pool", "race", "smoke", "tests", "tuning")
)


class InProcess:
    """A worker, or a pool of one, in this process; a pool takes so many cases and no more."""

    def __init__(self, factory: str, arguments: tuple[Any, ...], count: int = 2) -> None:
        module, _, name = factory.partition(":")
        self._bench, self._count = getattr(importlib.import_module(module), name)(*arguments), count

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: object) -> None: ...

    def call(self, verb: str, *arguments: Any, timeout_s: float) -> Any:
        return getattr(self._bench, verb)(*arguments)

    def map(
        self, verb: str, cases: Iterable[tuple[Any, ...]], *, limit_s: float, deadline: float, on_outcome: Callable
    ) -> None:
        for case in itertools.islice(cases, self._count):
            on_outcome(case, pool.outcome_of(self, verb, case, limit_s))


def test_the_parts_share_the_minutes() -> None:
    planned = gpu.plan(12, ["correctness", "tests", "kernels", "tune", "race", "smoke"])
    assert [part.name for part, _ in planned] == ["tests", "correctness", "tune", "kernels", "race", "smoke"]
    assert sum(seconds for _, seconds in planned) == pytest.approx(12 * 60)
    assert [seconds for _, seconds in gpu.plan(3, ["race"])] == [180]


def test_a_dry_run_prints_the_plan_and_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--out", str(tmp_path / "out"), "--parts", "tune,race"])
    gpu.main()
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()] == [
        ["7.2", "minutes", "tune:"],
        ["4.8", "minutes", "race:"],
    ]
    assert not (tmp_path / "out").exists()


def test_without_pytest_its_part_is_left_out_and_the_plan_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tests, "why_not", lambda: "pytest is not installed")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--parts", "tests,smoke"])
    gpu.main()
    assert capsys.readouterr().out.splitlines() == [
        "  0.0 minutes  tests: left out, since pytest is not installed",
        " 12.0 minutes  smoke: doctor, tune, train, eval and generate of the command line",
    ]


def test_tests_are_noted_as_they_end_and_only_those_that_passed_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """import os, pytest
pytestmark = pytest.mark.gpu
def test_right(): assert os.environ["TRITON_INTERPRET"] == "0"
@pytest.mark.parametrize("dtype", ["two words"])
def test_wrong(dtype): assert dtype == "one"
@pytest.mark.skip(reason="needs a GPU")
def test_skipped(): ...
"""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\naddopts = --no-such-option")
    (tmp_path / "test_here.py").write_text(text)
    monkeypatch.setattr(tests, "_ROOT", tmp_path)
    monkeypatch.setattr(tests, "TESTS", "test_here.py")
    for _ in range(2):
        tests.run(tmp_path, 600)
    rows = lines.Lines(tmp_path / "tests.jsonl").read()
    right, wrong, skipped = (
        f"test_here.py::{name}" for name in ("test_right", "test_wrong[two words]", "test_skipped")
    )
    first = [(right, "passed"), (wrong, "failed"), (skipped, "skipped"), (wrong, "failed")]
    assert [(row["test"], row["status"]) for row in rows] == [*first, *first[1:]]
    assert rows[3]["repeat"] == f"TRITON_INTERPRET=0 pytest -m gpu -n 0 '{wrong}'"
    assert rows[3]["repeat"] in capsys.readouterr().out
    gpu.write_summary(tmp_path, {"part": "tests", "exit": 0, "seconds": 9.5})
    summary = (tmp_path / "summary.md").read_text()
    assert "1 passed, 1 failed, 1 skipped" in summary
    assert f"- failed: {rows[3]['error']}\n  `{rows[3]['repeat']}`" in summary


def test_half_a_line_is_passed_over_and_the_next_begins_anew(tmp_path: Path) -> None:
    file = lines.Lines(tmp_path / "rows.jsonl")
    assert file.read() == []
    file.append({"a": 1})
    with file.path.open("a") as torn:
        torn.write('{"a": 2')
    file.append({"a": 3})
    assert file.read() == [{"a": 1}, {"a": 3}]


def test_a_part_that_dies_does_not_stop_the_next_and_the_summary_says_so(tmp_path: Path) -> None:
    parts = gpu.plan(1, ["race", "smoke"])
    gpu.run(parts, [sys.executable, "-S", "-c", "import os; os.abort()"], tmp_path)
    assert [row["exit"] for row in lines.Lines(tmp_path / "run.jsonl").read()] == [-6, -6]
    summary = (tmp_path / "summary.md").read_text()
    assert "| race | -6 |" in summary
    assert "| smoke | -6 |" in summary


def test_the_first_cases_are_the_defaults_and_cover_every_dataflow() -> None:
    listed = list(itertools.islice(correctness.cases(H100), 300))
    first = [(case["problem"]["op"], case["problem"]["dtype"]) for case in listed[:45]]
    assert len(set(first)) == 15
    found = {(case["problem"]["op"], case["schedule"].split()[0]) for case in listed}
    wanted = {(op, name) for op, _ in first for name in SearchSpace.of(_problem(listed, op), H100).choices}
    assert found == wanted
    for name in ("softmax_off_by_one", "per_head_weights", "mask_last_token", "packed", "deterministic", "noise"):
        assert any(case["problem"][name] for case in listed)


def _problem(listed: list[dict[str, Any]], op: str) -> Problem:
    return next(Problem(**case["problem"]) for case in listed if case["problem"]["op"] == op)


def test_a_second_run_of_correctness_goes_on_where_the_first_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correctness, "Pool", InProcess)
    for _ in range(2):
        correctness.run(tmp_path, CPU, "cpu", 1e9)
    rows = lines.Lines(tmp_path / "correctness.jsonl").read()
    assert [row["status"] for row in rows] == ["ok"] * 4
    assert [row["case"] for row in rows] == list(itertools.islice(correctness.cases(CPU), 4))


@pytest.mark.parametrize("packed", [False, True])
def test_a_wrong_kernel_gets_a_line_that_repeats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], packed: bool
) -> None:
    problem = Problem(op="hsa_backward", seq_len=67, num_heads=2, num_kv_heads=1, head_dim=8, chunk_size=16, top_k=2)
    problem = replace(problem, packed=packed)
    case = {"problem": problem.to_dict(), "schedule": "token block_tokens=16", "seed": 0}
    monkeypatch.setattr(correctness, "Pool", InProcess)
    monkeypatch.setattr(correctness, "cases", lambda target: iter([case]))
    checked = "_check_packed" if packed else "prepare"

    def wrong(*_: object) -> None:
        raise WrongResult("o is off by 1.0e+00")

    with monkeypatch.context() as broken:
        broken.setattr(correctness, checked, wrong)
        correctness.run(tmp_path, CPU, "cpu", 1e9)
        (row,) = lines.Lines(tmp_path / "correctness.jsonl").read()
        assert (row["failed"], row["status"], row["error"]) == (True, "WrongResult", "o is off by 1.0e+00")
        words = shlex.split(row["repeat"])
        assert words[:5] == ["python", "benchmarks/gpu.py", "--device", "cpu", "--repeat"]
        assert row["repeat"] in capsys.readouterr().out
        with pytest.raises(WrongResult, match="off by"):
            correctness.repeat(words[5], CPU, "cpu")
    assert correctness.repeat(gpu.parse(words[2:]).repeat, CPU, "cpu") == {"status": "ok"}


def test_a_pool_replaces_a_worker_that_dies_and_reports_its_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An error without a name of ours ends the process of a worker.
    text = "class Bench:\n    def hello(self): ...\n    def divide(self, by): return 1 / by\n"
    (tmp_path / "dividing.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    outcomes = {}
    with pool.Pool("dividing:Bench", (), size=1) as workers:
        workers.start()
        workers.map(
            "divide",
            [(0,), (1,), (2,)],
            limit_s=60,
            deadline=time.monotonic() + 600,
            on_outcome=lambda case, outcome: outcomes.update({case[0]: outcome}),
        )
    assert {case: outcome["status"] for case, outcome in outcomes.items()} == {0: "CandidateError", 1: "ok", 2: "ok"}
    assert "ZeroDivisionError" in outcomes[0]["error"]
    assert outcomes[2]["result"] == 0.5


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_a_tuning_keeps_a_winner_that_a_cache_reads_as_pretuned(tmp_path: Path, kv_heads: int) -> None:
    problem = Problem(seq_len=130, num_heads=2, num_kv_heads=kv_heads, head_dim=8, chunk_size=16, top_k=2)
    file = lines.Lines(tmp_path / "tune.jsonl")
    workers = InProcess("gpu_parts.benches:Compiler", (CPU, "cpu"), count=5)
    timer = InProcess("gpu_parts.benches:Timer", (CPU, "cpu"))
    with ThreadPoolExecutor(1) as loader:
        tuned = tuning.Tuned(problem, CPU, "cpu", file, workers, timer, loader)
        record = tuned.record(time.monotonic() + 1e6, heirs=[])
    assert record is not None
    assert record.schedule in tuned.times
    assert record.trials == len(tuned.times) >= 5
    assert SearchSpace.of(problem, CPU).default() in tuned.times
    assert record.inputs == "random and trained"
    cache, shipped = ScheduleCache(tmp_path / "mine"), tmp_path / "shipped"
    shipped.mkdir()
    tuning.keep(record, cache, shipped / "pretuned.json", file)
    assert read_records(shipped / "pretuned.json") == ({ScheduleKey.of_record(record): record}, [])
    found = ScheduleCache(tmp_path / "other", shipped).lookup(problem, CPU)
    assert found is not None
    assert (found.schedule, found.origin) == (record.schedule, "pretuned")
    assert file.read()[-1]["kind"] == "winner"


def test_a_candidate_that_is_wrong_on_the_real_inputs_is_no_finalist(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = benches.Timer(CPU, "cpu")
    problem = Problem(seq_len=130, num_heads=2, num_kv_heads=1, head_dim=8, chunk_size=16, top_k=2)
    timer.load(problem)
    first, second = itertools.islice(SearchSpace.of(problem, CPU).schedules(), 2)
    timer.compare(first, second)
    right = timer._calls(first)["random"]()
    monkeypatch.setattr(
        timer, "_calls", lambda each: dict.fromkeys(benches.DISTRIBUTIONS, lambda: right * (2 if each == first else 1))
    )
    with pytest.raises(WrongResult, match="from the default"):
        timer.compare(first, second)


def test_what_is_tried_first_can_run_on_an_h100_and_is_the_default() -> None:
    problems = [entry.problem for entry in tuning.entries(H100)]
    assert [problem.group for problem in problems[:6]] == [16, 16, 4, 4, 1, 1]
    for op, texts in tuning.PORTFOLIO.items():
        spaces = [SearchSpace.of(problem, H100) for problem in problems if problem.op == op]
        for text in texts:
            assert any(space.is_valid(Schedule.parse(text)) for space in spaces), text
    space = SearchSpace.of(problems[0], H100)
    first = list(itertools.islice(tuning.candidates(problems[0], H100, heirs=[]), 20))
    assert first[0] == space.default()
    assert len(set(first)) == 20
    near = list(tuning.neighbours(problems[0], H100, first[:1]))
    assert near
    assert all(sum(one[name] != first[0][name] for name in one) == 1 for one in near)


def test_a_smaller_problem_is_checked_that_has_the_same_kernels() -> None:
    for entry in tuning.entries(H100):
        for schedule in itertools.islice(tuning.candidates(entry.problem, H100, heirs=[]), 30):
            small = benches.check_problem(entry.problem, schedule)
            assert SearchSpace.of(small, H100).is_valid(schedule)
        texts = {emit(problem, schedule, H100).text for problem in (small, entry.problem)}
        assert len(texts) == 1


def test_a_command_that_lacks_a_package_is_skipped_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "hsa_compile").mkdir()
    (tmp_path / "hsa_compile" / "__init__.py").touch()
    (tmp_path / "hsa_compile" / "__main__.py").write_text(
        "import sys\nif sys.argv[1] == 'tune': import no_such_package\nprint('fine')\nsys.exit(sys.argv[1] == 'eval')\n"
    )
    rows = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smoke, "_ROOT", tmp_path)
        patch.chdir(tmp_path)
        for name in ("doctor", "tune", "eval"):
            rows.append(smoke.run_one(smoke.Command(name, (name,)), "cpu", str(tmp_path), 600))
    assert [(row["status"], row["exit"]) for row in rows] == [("ok", 0), ("skipped", 1), ("failed", 1)]
    assert rows[1]["reason"] == "No module named 'no_such_package'"
    assert rows[0]["last_lines"] == ["fine"]


def test_the_summary_shows_what_was_found(tmp_path: Path) -> None:
    case = {"problem": {}, "schedule": "token", "seed": 0}
    lines.Lines(tmp_path / "run.jsonl").append({"kind": "device", "slug": "h100", "device": "H100", "versions": {}})
    failed = correctness.row_of(case, {"status": "WrongResult", "seconds": 1.0, "error": "o is off"}, "cuda:0")
    lines.Lines(tmp_path / "correctness.jsonl").append(failed)
    measurement = {"median_ms": 10.79, "p20_ms": 10.0, "p80_ms": 11.0, "repeats": 15}
    result = {"kind": "result", "heat": "T65536 G16 random", "kind_of_case": "forward", "contender": "hsa-compile"}
    result |= {"measurement": measurement, "ratio": [1.0, 1.0, 1.0], "tflops": 101.2, "status": "timed", "note": ""}
    lines.Lines(tmp_path / "race.jsonl").append(result)
    gpu.write_summary(tmp_path, {"part": "race", "exit": 0, "seconds": 9.5})
    text = (tmp_path / "summary.md").read_text()
    assert "| T65536 G16 random | forward | hsa-compile | 10.790 | 1.00 | 101 |  |" in text
    assert failed["repeat"] in text
    merged = json.loads((tmp_path / "gpu_h100.json").read_text())
    assert merged["correctness"]["statuses"] == {"WrongResult": 1}
    assert merged["race"][0]["measurement"] == measurement


def test_each_short_call_and_each_default_is_timed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = tuning.entries(CPU)[0].problem
    monkeypatch.setattr(kernels, "entries", lambda target: [tuning.Entry(problem, 1.0)])
    monkeypatch.setattr(kernels, "_CALLS", 1)
    for _ in range(2):
        kernels.run(tmp_path, CPU, "cpu", 600)
    rows = lines.Lines(tmp_path / "kernels.jsonl").read()
    assert [row["problem"] for row in rows] == [p.describe() for p in (*kernels.short_calls(CPU), problem)]
    assert all(row["call_us"] > 0 for row in rows[:-1])
    assert rows[-1]["schedule"] == str(SearchSpace.of(problem, CPU).default())
    assert rows[-1]["random_ms"] > 0
    split = {"random": {"one": 2.5, "two": 1.25}, "trained": {"one": 1.5}}
    lines.Lines(tmp_path / "kernels.jsonl").append({**rows[-1], "kernels": split})
    gpu.write_summary(tmp_path, {"part": "kernels", "exit": 0, "seconds": 9.5})
    summary = (tmp_path / "summary.md").read_text()
    assert f"| {rows[0]['problem']} | {rows[0]['call_us']:.1f} |  |" in summary
    assert f"| {problem.describe()} | two | 1.250 | 0.000 |" in summary
    assert "kernels: {" in capsys.readouterr().out


def test_a_race_is_begun_with_what_tells_most() -> None:
    heats = race.heats(H100)
    assert heats[0].name == "T65536 G16 random"
    assert {heat.tokens for heat in heats} == {16384, 65536, 1 << 20}
    assert heats[-1].tokens == 1 << 20
    assert race.problem_of(heats[2], H100).group == 4


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_the_process_of_a_heat_is_started_with_words_that_it_knows(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def started(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", started)
    race.run(tmp_path, H100, device, 1e9, ["mine.py:attention"])  # no process takes any of it
    assert len(commands) == len(race.heats(H100))
    for command, heat in zip(commands, race.heats(H100), strict=True):
        given = gpu.parse(command[2:])
        assert race.Heat(**json.loads(given.heat)) == heat
        assert (given.device, given.contender) == (device.partition(":")[0], ["mine.py:attention"])
