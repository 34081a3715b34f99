"""Commands run on this CPU, and most of them without its C++ compiler."""

from collections.abc import Iterator

import pytest
from shell import Shell, record_of

from hsa_compile.paths import cxx_compiler
from hsa_compile.problem import OPS
from hsa_compile.schedules.cache import default_cache
from hsa_compile.target import this_cpu


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@pytest.fixture
def stored() -> None:
    """Entries for both ops of the tiny problem."""
    for op in OPS:
        default_cache().put(record_of(op))


@pytest.fixture(autouse=True)
def _no_compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU kernels are PyTorch here: to build C++ takes seconds. A test that wants it asks for `compiler`."""
    if "compiler" not in request.fixturenames:
        monkeypatch.setenv("CXX", "there-is-no-such-compiler")
    this_cpu.cache_clear()
    yield
    this_cpu.cache_clear()


@pytest.fixture
def compiler() -> str:
    """The machine's own C++ compiler."""
    found = cxx_compiler()
    if found is None:
        pytest.skip("no C++ compiler")
    return found
