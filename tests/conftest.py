"""Fixtures for all tests. Triton kernels run in its interpreter, which is chosen when Triton is imported.

Only the tests that need a GPU (`-m gpu`) are run with `TRITON_INTERPRET=0`.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
# One thread for each of the two test processes: more only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from hsa_compile.kernels import compile as compile_module
from hsa_compile.kernels.emit import KernelSource
from hsa_compile.target import this_cpu

# A busy machine may draw examples slowly, and take long for one.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")

# What `--cpu` may be → what PyTorch calls it in ATEN_CPU_CAPABILITY; each executes what stands before it, too.
CAPABILITIES = {"none": "default", "avx2": "avx2", "avx512": "avx512"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu", choices=CAPABILITIES, help="test as on a CPU with this vector extension")
    parser.addoption("--case", help="a case of test_random_cases.py, as it prints one that fails")
    parser.addoption("--refresh-goldens", action="store_true", help="write the golden sources anew")


def pytest_configure(config: pytest.Config) -> None:
    """Has PyTorch, and so every test, see the CPU of `--cpu`; other processes inherit that.

    PyTorch takes the word for it and would die of an instruction that the machine lacks. There, only the target is
    another: kernels are emitted for it, and `_executed` skips what would run them.
    """
    chosen = config.getoption("--cpu")
    if chosen is None:
        return
    if chosen == "none" or getattr(torch.cpu, f"_is_{chosen}_supported")():
        os.environ["ATEN_CPU_CAPABILITY"] = CAPABILITIES[chosen]
        if torch.backends.cpu.get_cpu_capability().lower() != CAPABILITIES[chosen] and chosen != "none":
            raise pytest.UsageError(f"--cpu {chosen} comes too late: PyTorch has chosen its kernels already")
    else:
        torch.backends.cpu.get_cpu_capability = lambda: chosen.upper()


_own_capability = torch.backends.cpu.get_cpu_capability


def why_not_executed(arch: str) -> str | None:
    """Why C++ for a vector extension cannot run in this process; None if it can."""
    order, own = list(CAPABILITIES), _own_capability().lower()
    if arch in order and (own not in order or order.index(arch) > order.index(own)):
        return f"{arch} is not executed here: PyTorch finds {own}"
    return None


@pytest.fixture(autouse=True)
def _executed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips a test when it comes to run C++ for a vector extension that this CPU, or that of `--cpu`, has not."""
    compile_native = compile_module._compile_native

    def compile_if_executed(source: KernelSource) -> object:
        if reason := why_not_executed(source.target.arch):
            pytest.skip(reason)
        return compile_native(source)

    monkeypatch.setattr(compile_module, "_compile_native", compile_if_executed)


@pytest.fixture(scope="session")
def kernel_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where kernels are built in this session, once for all tests and test processes: their names are their content."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    directory = shared / "kernels"
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, kernel_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the schedules of the person who runs it, of another test, or those that ship."""
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    monkeypatch.setattr("hsa_compile.schedules.cache.PRETUNED_DIR", tmp_path / "pretuned")
    (cache / "kernels").symlink_to(kernel_dir)
    monkeypatch.setenv("HSA_COMPILE_CACHE_DIR", str(cache))


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU kernels are PyTorch: to build C++ takes seconds, and other tests compare it with what runs without."""
    monkeypatch.setenv("CXX", "there-is-no-such-compiler")
    this_cpu.cache_clear()
    yield
    this_cpu.cache_clear()
