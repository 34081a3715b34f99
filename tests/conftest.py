"""Fixtures for all tests. Triton kernels run in its interpreter, which is chosen when Triton is imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
# One thread for each of the two test processes: more only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest

from hsa_compile.target import this_cpu


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the schedules of the person who runs it."""
    monkeypatch.setenv("HSA_COMPILE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU kernels are PyTorch: to build C++ takes seconds, and other tests compare it with what runs without."""
    monkeypatch.setenv("CXX", "there-is-no-such-compiler")
    this_cpu.cache_clear()
    yield
    this_cpu.cache_clear()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--case", help="a case of test_random_cases.py, as it prints one that fails")
    parser.addoption("--refresh-goldens", action="store_true", help="write the golden sources anew")
