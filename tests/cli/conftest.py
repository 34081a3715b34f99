"""Commands run on this CPU, and most of them without its C++ compiler."""

from collections.abc import Iterator

import pytest

from hsa_compile.paths import cxx_compiler
from hsa_compile.target import this_cpu


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
