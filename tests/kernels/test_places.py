"""A kernel runs wherever it can be kept: a full, noexec or missing cache and a useless compiler cost a warning each."""

import ctypes
import errno
import inspect
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import platformdirs
import pytest
import torch

from hsa_compile import paths
from hsa_compile.errors import CacheWarning, CompileError, CompilerCrashed, CompileTimedOut, HSACompileWarning
from hsa_compile.files import write_whole
from hsa_compile.kernels import compile as compile_module
from hsa_compile.kernels import native
from hsa_compile.kernels import resolve as resolve_module
from hsa_compile.kernels.compile import compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.kernels.hsa_attention.reference import hsa_attention_reference
from hsa_compile.kernels.resolve import resolve
from hsa_compile.paths import cache_dir, cxx_compiler
from hsa_compile.problem import Problem
from hsa_compile.schedules.space import default_schedule
from hsa_compile.target import Target

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")

PROBLEM = Problem(seq_len=64, num_heads=4, num_kv_heads=2, head_dim=8, chunk_size=16, top_k=2)
WITH_COMPILER = Target(kind="cpu", name="A CPU", arch="avx2", num_cores=2, has_compiler=True)
WITHOUT_COMPILER = Target(kind="cpu", name="A CPU", arch="avx2", num_cores=2)


@pytest.fixture
def kernel_dir(tmp_path: Path) -> Path:
    """No kernel is there yet: what another test wrote would not be written again."""
    directory = tmp_path / "kernels"
    directory.mkdir(mode=0o700)
    return directory


@pytest.fixture(autouse=True)
def spare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing was compiled or warned about yet; temporary files go to a directory of the test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name, empty in (("_modules", {}), ("_unusable", set())):
        monkeypatch.setattr(compile_module, name, empty)
    monkeypatch.setattr(resolve_module, "_warned", set())
    paths._without_home.cache_clear()
    return paths.temporary_dir()


def test_what_has_the_name_of_the_temporary_directory_does_not_end_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    paths._own_temporary_dir.cache_clear()
    (tmp_path / f"hsa-compile-{os.getuid()}").touch()
    found = paths.temporary_dir()
    assert (found.parent, found.is_dir(), found.stat().st_mode & 0o777) == (tmp_path, True, 0o700)
    paths._own_temporary_dir.cache_clear()


def test_on_a_full_disk_a_kernel_is_kept_in_a_temporary_directory(spare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole = compile_module.write_whole

    def write(path: Path, content: bytes) -> None:
        if not path.is_relative_to(spare):
            raise OSError(errno.ENOSPC, "No space left on device")
        write_whole(path, content)

    monkeypatch.setattr(compile_module, "write_whole", write)
    first, second = (
        emit(problem, default_schedule(problem, WITHOUT_COMPILER), WITHOUT_COMPILER)
        for problem in (PROBLEM, PROBLEM.with_op("hsa_backward"))
    )
    with pytest.warns(CacheWarning, match=r"cannot be kept in .*kernels \(No space left on device\)"):
        assert compile_kernel(first).path.parent == spare
    assert compile_kernel(second).path.parent == spare  # without a second warning


@pytest.mark.parametrize("everywhere", [False, True])
def test_where_no_library_can_be_loaded_another_place_or_kernel_serves(
    everywhere: bool, spare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> SimpleNamespace:
        if everywhere or not Path(name).is_relative_to(spare):
            raise OSError(f"{name}: failed to map segment from shared object")
        return SimpleNamespace()

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(compile_module, "build_library", lambda path, *_: path.with_suffix(".so"))
    with pytest.warns(HSACompileWarning, match="failed to map") as caught:
        kernel = resolve(PROBLEM, WITH_COMPILER)
    assert kernel.source.backend == ("torch" if everywhere else "cpp")
    assert [w.category for w in caught if "failed to map" in str(w.message)] == [
        HSACompileWarning if everywhere else CacheWarning
    ]


@pytest.mark.skipif(shutil.which("true") is None, reason="there is no `true`")
def test_a_compiler_that_writes_nothing_makes_the_next_best_kernel_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "true --with 'an argument'")
    with pytest.warns(HSACompileWarning, match=r"true --with an argument .* wrote no library; the slower PyTorch"):
        assert resolve(PROBLEM, WITH_COMPILER).source.backend == "torch"


def test_a_compiler_that_cannot_be_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "c++"
    program.write_text("no program\n")
    monkeypatch.setattr(native, "cxx_compiler", lambda: (str(program),))
    with pytest.raises(CompileError, match=r"c\+\+ cannot be run: "):
        native.build_library(tmp_path / "kernel.cpp", "avx2")


@pytest.fixture
def compiler_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a script in the compiler's place; returns the source that it is to build."""

    def put(script: str) -> Path:
        program = tmp_path / "c++"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(native, "cxx_compiler", lambda: (str(program),))
        return tmp_path / "kernel.cpp"

    return put


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("echo 'kernel.cpp:3:1: error: no such thing' >&2; exit 1", CompileError),
        ("echo '/tmp/cc.s: fatal error: cannot write: No space left on device' >&2; exit 1", CompilerCrashed),
        ("echo 'c++: fatal error: Killed signal terminated program cc1plus' >&2; exit 1", CompilerCrashed),
        ("echo 'cc1plus: out of memory allocating 64 bytes' >&2; exit 1", CompilerCrashed),
        ("kill -9 $$", CompilerCrashed),
    ],
)
def test_a_compiler_that_the_machine_did_not_let_work_has_refused_nothing(
    script: str, error: type[CompileError], compiler_does: Callable[[str], Path]
) -> None:
    with pytest.raises(CompileError) as raised:
        native.build_library(compiler_does(script), "avx2")
    assert type(raised.value) is error


def test_a_build_that_takes_too_long_is_killed(compiler_does: Callable[[str], Path]) -> None:
    with pytest.raises(CompileTimedOut, match=r"c\+\+ was killed after 0 s"):
        native.build_library(compiler_does("sleep 600"), "avx2", native.CxxRunner(0.01))


def test_a_closed_runner_has_killed_the_compiler_with_what_it_started(
    compiler_does: Callable[[str], Path], tmp_path: Path
) -> None:
    source = compiler_does(f"cd '{tmp_path}'; sleep 600 & echo $! > new; mv new pid; wait")
    runner = native.CxxRunner()
    with ThreadPoolExecutor(1) as threads:
        building = threads.submit(native.build_library, source, "avx2", runner)
        while not (tmp_path / "pid").exists():
            time.sleep(0.01)
        runner.close()
        with pytest.raises(CompilerCrashed, match="died of SIGKILL"):
            building.result()
    stat = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX":
        time.sleep(0.01)  # for ever, if it lives on
    with pytest.raises(CompilerCrashed, match="the search has ended"):
        native.build_library(source, "avx2", runner)
    assert not list(tmp_path.glob(".*.build"))


def test_folders_that_killed_builds_left_are_removed_after_a_day(
    compiler_does: Callable[[str], Path], tmp_path: Path
) -> None:
    old, new = tmp_path / ".kernel.abc.build", tmp_path / ".kernel.def.build"
    for folder in (old, new):
        folder.mkdir()
        (folder / "kernel.so").touch()
    os.utime(old, (time.time() - 90_000,) * 2)
    with pytest.raises(CompileError):
        native.build_library(compiler_does("exit 1"), "avx2")
    assert (old.exists(), new.exists()) == (False, True)


def test_the_compiler_may_have_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"'{sys.executable}' g++ -B'/a b'")
    assert cxx_compiler() == (sys.executable, "g++", "-B/a b")
    for useless in ("'", "there-is-no-such-compiler g++", " "):
        monkeypatch.setenv("CXX", useless)
        assert cxx_compiler() is None


def test_without_a_home_the_cache_is_temporary_and_says_so_once(spare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HSA_COMPILE_CACHE_DIR", "~no-such-user-at-all/cache")
    with pytest.warns(CacheWarning, match=r"no home directory for the cache \(~no-such-user-at-all/cache\)"):
        assert cache_dir() == spare
    assert cache_dir() == spare
    monkeypatch.delenv("HSA_COMPILE_CACHE_DIR")

    def user_cache_dir(name: str) -> str:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr(platformdirs, "user_cache_dir", user_cache_dir)
    with pytest.warns(CacheWarning, match="no home directory"):
        assert cache_dir() == spare
    monkeypatch.setenv("HSA_COMPILE_CACHE_DIR", "-x")
    assert cache_dir() == Path.cwd() / "-x"


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The libraries that were built, without a compiler, and "loaded"."""
    built: list[Path] = []

    def build(source: Path, library: Path, arch: str, runner: native.CxxRunner) -> None:
        library.write_bytes(b"a library")
        library.chmod(0o755)
        built.append(library)

    monkeypatch.setattr(native, "_build", build)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    return built


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)


def test_a_library_is_loaded_only_if_nobody_else_can_have_written_it(
    builds: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, library = tmp_path / "kernel.cpp", tmp_path / "kernel.so"
    for change in (lambda: None, lambda: library.chmod(0o775), lambda: library.chmod(0o757)):
        change()
        assert native.build_library(source, "avx2") == library
        assert native.build_library(source, "avx2") == library
    assert len(builds) == 3
    give_away(library, monkeypatch)
    native.build_library(source, "avx2")
    assert len(builds) == 4


@pytest.mark.parametrize("folder", ["", "kernels"])
def test_where_others_can_write_no_library_is_loaded_and_a_warning_says_how_to_mend_it(
    folder: str, builds: list[Path], spare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "own"
    (cache / "kernels").mkdir(parents=True, mode=0o755)
    monkeypatch.setenv("HSA_COMPILE_CACHE_DIR", str(cache))
    (cache / folder).chmod(0o775)
    with pytest.warns(CacheWarning, match=r"others can write to .* chmod go-w") as caught:
        kernel = resolve(PROBLEM, WITH_COMPILER)
    assert kernel.path.parent == spare
    assert [w.category for w in caught].count(CacheWarning) == 1
    (cache / folder).chmod(0o755)
    compile_module._modules.clear()
    assert compile_kernel(kernel.source).path.parent == cache / "kernels"


def test_what_others_wrote_to_the_file_of_a_python_kernel_never_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text("raise SystemExit('this was planted')\n")
    monkeypatch.setattr(compile_module, "_written", lambda source: planted)
    source = emit(PROBLEM, default_schedule(PROBLEM, WITHOUT_COMPILER), WITHOUT_COMPILER)
    kernel = compile_kernel(source)
    assert kernel.path == planted
    assert inspect.getsource(kernel.entry) in source.text


def test_where_nothing_can_be_written_a_kernel_runs_from_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setenv("HSA_COMPILE_CACHE_DIR", str(tmp_path / "new"))
    monkeypatch.setattr(compile_module, "write_whole", full)
    with pytest.warns(CacheWarning, match="Read-only file system.* run from memory"):
        kernel = resolve(PROBLEM, WITHOUT_COMPILER)
    resolve(PROBLEM.with_op("hsa_backward"), WITHOUT_COMPILER)  # without a second warning
    q, k = torch.randn(1, 64, 4, 8), torch.randn(1, 64, 2, 8)
    picks, weights = torch.zeros(1, 64, 2, 2, dtype=torch.int64), torch.ones(1, 64, 2, 2)
    expected = hsa_attention_reference(q, k, k, picks, weights, chunk_size=16)
    torch.testing.assert_close(kernel.entry(q, k, k, picks, weights, scale=8**-0.5), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("umask", "schedules"), [(0o002, 0o775), (0o077, 0o700)])
def test_the_roots_owner_alone_writes_there_and_what_is_shared_follows_the_umask(
    umask: int, schedules: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HSA_COMPILE_CACHE_DIR", str(tmp_path / "new"))
    before = os.umask(umask)
    try:
        paths.make_cache_dir(paths.schedule_dir())
        paths.make_cache_dir(paths.kernel_dir(), mode=0o755)
        write_whole(paths.schedule_dir() / "a.json", b"{}")
    finally:
        os.umask(before)
    assert paths.schedule_dir().stat().st_mode & 0o777 == schedules
    assert (paths.schedule_dir() / "a.json").stat().st_mode & 0o777 == 0o666 & ~umask
    assert paths.why_distrusted(paths.kernel_dir(), paths.cache_dir()) is None
