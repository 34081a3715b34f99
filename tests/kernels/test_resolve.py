"""Which schedule a call runs on, what it says about it, and what a hook may do before."""

import logging
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hsa_compile
from hsa_compile import log
from hsa_compile.errors import HSACompileWarning, OutOfResources, UntunedWarning
from hsa_compile.kernels import native
from hsa_compile.kernels import resolve as resolve_module
from hsa_compile.kernels.compile import Kernel
from hsa_compile.kernels.hsa_attention import dispatch as torch_ops
from hsa_compile.kernels.resolve import resolve, set_on_miss
from hsa_compile.kernels.select_chunks import dispatch as select_ops
from hsa_compile.problem import OPS, SELECT_OPS, Problem
from hsa_compile.schedules import cache as cache_module
from hsa_compile.schedules.cache import default_cache, tuned_for
from hsa_compile.schedules.lookup import RegretBin, RegretTable
from hsa_compile.schedules.record import Measurement, TuningRecord
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.schedules.space import default_schedule
from hsa_compile.target import Target

# In float64, which is never built from C++.
PROBLEM = Problem(seq_len=64, num_heads=4, num_kv_heads=2, head_dim=8, chunk_size=16, top_k=2, dtype="float64")
TOKEN_4 = Schedule.of("token", block_tokens=4)


def record(problem: Problem = PROBLEM, schedule: Schedule = TOKEN_4, **changes: Any) -> TuningRecord:
    time = Measurement(median_ms=1.0, p20_ms=1.0, p80_ms=1.0, repeats=9)
    made = TuningRecord(
        problem=problem, target=Target.parse("cpu"), schedule=schedule, measurement=time, default_measurement=time,
        trials=1, failures={}, inputs="random", fingerprint="", versions={}, date="2026-02-03T04:05:06+00:00",
    )  # fmt: skip
    return replace(made, **changes)


@pytest.fixture(autouse=True)
def _anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing was warned about yet; a regret table that reaches to distance 2; the hook is taken out again."""
    monkeypatch.setattr(resolve_module, "_warned", set())
    entry = RegretBin(up_to=2.0, pairs=5, mean=0.04, p90=0.1, default_mean=0.2)
    table = RegretTable(device="Some CPU", shapes=3, bins=(entry,))
    monkeypatch.setattr("hsa_compile.schedules.lookup.regret_table", lambda kind: table)
    yield
    set_on_miss(None)


def warned(problem: Problem = PROBLEM) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resolve(problem, Target.parse("cpu"))
    assert all(issubclass(warning.category, UntunedWarning) for warning in caught)
    return [str(warning.message) for warning in caught]


def test_an_untuned_problem_runs_on_the_default_and_says_once_how_to_tune_it() -> None:
    (message,) = warned()
    assert "the default runs; tune it with: hsa-compile tune --device cpu" in message
    assert "--head-dim 8" in message
    assert warned() == []


def test_problems_whose_kernels_differ_are_each_warned_about() -> None:
    select = replace(PROBLEM, op="select_chunks", num_heads=2)
    variants = [select, replace(select, landmarks_per_chunk=8), replace(select, noise=True), PROBLEM]
    variants += [replace(PROBLEM, softmax_off_by_one=True), replace(PROBLEM, packed=True)]
    assert [len(warned(problem)) for problem in variants] == [1] * len(variants)
    assert [len(warned(replace(problem, batch=2))) for problem in variants] == [0] * len(variants)


def test_the_command_names_all_that_flags_of_a_shape_cannot_say() -> None:
    asked = replace(PROBLEM, op="select_chunks", num_heads=2, kv_len=256, landmarks_per_chunk=8, noise=True)
    (message,) = warned(asked)
    words = shlex.split(message.split("tune it with: ")[1])
    assert words[:-1] == ["hsa-compile", "tune", "--device", "cpu", "--problem"]
    assert Problem.parse(words[-1]) == asked
    (message,) = warned(replace(PROBLEM, softmax_off_by_one=True))
    assert message.endswith(' --problem "hsa_forward B1 T64 HQ4 H2 D8 C16 K2 float64 softmax_off_by_one"')
    (message,) = warned(replace(PROBLEM, op="hsa_backward", softmax_off_by_one=True))
    assert "hsa_backward" in message.split("tune it with: ")[1]


def test_an_exact_and_a_near_entry_run_without_a_word() -> None:
    default_cache().put(record())
    assert warned() == []
    assert warned(replace(PROBLEM, seq_len=128, kv_len=128)) == []


def test_an_entry_farther_than_any_measured_pair_runs_and_warns_once() -> None:
    default_cache().put(record())
    far = replace(PROBLEM, seq_len=64 << 6, kv_len=64 << 6)
    (message,) = warned(far)
    assert "at distance 9.0 is not known" in message
    assert "tune it with: hsa-compile tune" in message
    assert warned(far) == []
    assert resolve(far, Target.parse("cpu")).source.schedule == TOKEN_4


def test_tuned_for_tells_the_entry_its_distance_and_the_expected_loss() -> None:
    assert tuned_for(PROBLEM) is None
    default_cache().put(record())
    exact = hsa_compile.tuned_for(PROBLEM, Target.parse("cpu"))
    assert exact is not None
    assert (exact.schedule, exact.origin, exact.distance, exact.regret) == (TOKEN_4, "user", 0.0, 0.0)
    near = tuned_for(replace(PROBLEM, kv_len=128), Target.parse("cpu"))
    assert near is not None
    assert (near.distance, near.regret) == (0.5, 0.04)
    far = tuned_for(replace(PROBLEM, seq_len=1 << 20), Target.parse("cpu"))
    assert far is not None
    assert far.regret is None


def test_an_entry_of_another_device_has_no_known_loss_unless_it_is_predicted() -> None:
    other = replace(Target.parse("cpu"), name="Another CPU")
    default_cache().put(record(target=other))
    found = tuned_for(PROBLEM, Target.parse("cpu"))
    assert found is not None
    assert (found.distance, found.regret) == (2.0, None)
    time = Measurement.predicted(1.0)
    default_cache().clear()
    default_cache().put(record(target=other, kind="predicted", measurement=time, default_measurement=time))
    found = tuned_for(PROBLEM, Target.parse("cpu"))
    assert found is not None
    assert found.is_predicted
    assert found.regret == 0.0


def test_the_hook_is_asked_once_a_problem_and_what_it_stores_is_used() -> None:
    asked = []

    def tune_now(problem: Problem, target: Target) -> None:
        asked.append(problem)
        default_cache().put(record(problem))

    set_on_miss(tune_now)
    assert warned() == []
    assert resolve(PROBLEM, Target.parse("cpu")).source.schedule == TOKEN_4
    assert asked == [PROBLEM]
    near = replace(PROBLEM, top_k=1)
    warned(near)
    assert asked == [PROBLEM, near]


def test_a_hook_that_stores_nothing_is_not_asked_again() -> None:
    asked = []
    set_on_miss(lambda problem, target: asked.append(problem))
    assert len(warned()) == 1
    assert warned() == []
    assert asked == [PROBLEM]
    assert resolve(PROBLEM, Target.parse("cpu")).source.schedule == default_schedule(PROBLEM, Target.parse("cpu"))
    set_on_miss(None)
    warned(replace(PROBLEM, top_k=1))
    assert asked == [PROBLEM]


def test_a_hook_that_fails_is_warned_about_and_the_next_best_runs() -> None:
    def fail(problem: Problem, target: Target) -> None:
        raise OutOfResources("there is no room")

    set_on_miss(fail)
    with pytest.warns() as caught:
        kernel = resolve(PROBLEM, Target.parse("cpu"))
    assert [warning.category for warning in caught] == [HSACompileWarning, UntunedWarning]
    assert str(caught[0].message).endswith("could not be tuned: there is no room")
    assert kernel.source.schedule == default_schedule(PROBLEM, Target.parse("cpu"))


def test_debug_messages_tell_the_schedule_and_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="hsa_compile"):
        warned()
        default_cache().put(record())
        warned()
        warned(replace(PROBLEM, kv_len=128))
    first, exact, near = (entry.getMessage() for entry in caplog.records)
    assert "nothing has been tuned yet" in first
    assert "runs token block_tokens=4: served exactly by the user entry (measured)" in exact
    assert "served at distance 0.50 by the user entry" in near


def test_the_environment_turns_the_messages_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for level, enabled in (("debug", logging.DEBUG), ("info", logging.INFO)):
        monkeypatch.setattr(log, "logger", logging.Logger("new"))
        monkeypatch.setenv("HSA_COMPILE_LOG", level)
        log.set_up_logging()
        assert log.logger.level == enabled
    monkeypatch.setattr(log, "logger", logging.Logger("new"))
    monkeypatch.setenv("HSA_COMPILE_LOG", "loud")
    with pytest.warns(HSACompileWarning, match="HSA_COMPILE_LOG = 'loud' is not one of debug, info, warning, error"):
        log.set_up_logging()
    assert not log.logger.handlers


def test_importing_the_package_turns_the_messages_on() -> None:
    script = "import hsa_compile, logging; logging.getLogger('hsa_compile').debug('hello')"
    environment = {**os.environ, "HSA_COMPILE_LOG": "debug"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == "hsa-compile DEBUG: hello\n"


def test_a_lookup_is_answered_from_memory_the_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    default_cache().put(record())
    first = tuned_for(PROBLEM, Target.parse("cpu"))

    def again(*_: object) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr(cache_module.ScheduleCache, "candidates", again)
    assert tuned_for(PROBLEM, Target.parse("cpu")) is first


def test_thousands_of_lengths_do_not_grow_what_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    target, cache = Target.parse("cpu"), default_cache()
    most = resolve_module._MAX_REMEMBERED
    monkeypatch.setattr(resolve_module, "_kernels", {})
    monkeypatch.setattr(resolve_module, "resolve", lambda problem, target: problem)
    for length in range(2 * most + 10):
        resolve_module.remembered(length, target, lambda: PROBLEM)
        cache.lookup(replace(PROBLEM, seq_len=16 + length, kv_len=16 + length), target)
    assert len(resolve_module._kernels) <= most
    assert len(cache._answers) <= most


def test_a_library_that_is_not_whole_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    def build(source: Path, library: Path, arch: str, runner: native.CxxRunner) -> None:
        built.append(arch)
        library.write_bytes(b"a library")

    monkeypatch.setattr(native, "_build", build)
    source, library = tmp_path / "kernel.cpp", tmp_path / "kernel.so"
    for content in (b"a libr", b"", b"a librarY"):
        assert native.build_library(source, "avx2").read_bytes() == b"a library"
        library.write_bytes(content)
    assert native.build_library(source, "avx2").read_bytes() == b"a library"
    assert native.build_library(source, "avx2").read_bytes() == b"a library"
    assert len(built) == 4


@pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")
@pytest.mark.parametrize("wanted", [False, True])
def test_deterministic_algorithms_of_pytorch_ask_for_deterministic_schedules(
    wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, bool] = {}

    def remembered(key: Any, target: Target, problem: Callable[[], Problem]) -> Kernel:
        asked[problem().op] = problem().deterministic
        return resolve_module.remembered(key, target, problem)

    for module in (torch_ops, select_ops):
        monkeypatch.setattr(module, "remembered", remembered)
    x = torch.randn(1, 64, 2, 8, dtype=torch.float64, requires_grad=True)
    torch.use_deterministic_algorithms(wanted)
    try:
        picks = hsa_compile.select_chunks(x, x[:, ::16], chunk_size=16, top_k=2)
        hsa_compile.hsa_attention(x, x, x, *picks, chunk_size=16).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == dict.fromkeys((*OPS, *SELECT_OPS), wanted)


OPTIONS: list[dict[str, bool]] = [{}, {"softmax_off_by_one": True}, {"mask_last_token": True}]


@pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")
@pytest.mark.parametrize("options", [OPTIONS, OPTIONS[::-1]], ids=["plain first", "plain last"])
def test_calls_that_differ_in_an_option_alone_get_kernels_of_their_own(options: list[dict[str, bool]]) -> None:
    q, k, v = torch.randn(3, 1, 12, 2, 8, dtype=torch.float64)
    picks, weights = torch.randint(-1, 3, (1, 12, 2, 2)), torch.rand(1, 12, 2, 2, dtype=torch.float64)
    k_pages, v_pages = (x.unflatten(1, (3, 4)).transpose(2, 3)[0].contiguous() for x in (k, v))
    for chosen in options:
        o = hsa_compile.hsa_attention(q, k, v, picks, weights, chunk_size=4, **chosen)
        torch.testing.assert_close(
            o, hsa_compile.hsa_attention_reference(q, k, v, picks, weights, chunk_size=4, **chosen)
        )
        for table in (None, torch.tensor([[2, 0, 1]])):
            args = (q, k_pages, v_pages, picks, weights)
            o = hsa_compile.hsa_decode(*args, page_table=table, **chosen)
            torch.testing.assert_close(o, hsa_compile.hsa_decode_reference(*args, page_table=table, **chosen))
