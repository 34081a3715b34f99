"""A kernel runs wherever it can be kept: a full, noexec or missing cache and a useless compiler cost a warning each."""

import ctypes
import errno
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import platformdirs
import pytest

from hsa_compile import paths
from hsa_compile.errors import CacheWarning, CompileError, HSACompileWarning
from hsa_compile.kernels import compile as compile_module
from hsa_compile.kernels import native
from hsa_compile.kernels import resolve as resolve_module
from hsa_compile.kernels.compile import compile_kernel
from hsa_compile.kernels.emit import emit
from hsa_compile.kernels.resolve import resolve
from hsa_compile.paths import cache_dir, cxx_compiler
from hsa_compile.problem import Problem
from hsa_compile.schedules.space import default_schedule
from hsa_compile.target import Target

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")

PROBLEM = Problem(seq_len=64, num_heads=4, num_kv_heads=2, head_dim=8, chunk_size=16, top_k=2)
WITH_COMPILER = Target(kind="cpu", name="A CPU", arch="avx2", num_cores=2, has_compiler=True)
WITHOUT_COMPILER = Target(kind="cpu", name="A CPU", arch="avx2", num_cores=2)


@pytest.fixture(autouse=True)
def spare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing was compiled or warned about yet; temporary files go to a directory of the test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name, empty in (("_modules", {}), ("_unusable", set())):
        monkeypatch.setattr(compile_module, name, empty)
    monkeypatch.setattr(resolve_module, "_warned", set())
    paths._without_home.cache_clear()
    return paths.temporary_dir()


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
    monkeypatch.setattr(compile_module, "build_library", lambda path, arch: path.with_suffix(".so"))
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
