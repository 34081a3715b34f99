"""What the tests of the ops share."""

from collections.abc import Iterator

import pytest

from hsa_compile.paths import cxx_compiler
from hsa_compile.target import this_cpu


@pytest.fixture
def family(request, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Which template family serves the CPU in this test."""
    if request.param == "torch":
        monkeypatch.setattr("hsa_compile.target.cxx_compiler", lambda: None)
    elif cxx_compiler() is None:
        pytest.skip("there is no C++ compiler")
    this_cpu.cache_clear()
    yield request.param
    this_cpu.cache_clear()
