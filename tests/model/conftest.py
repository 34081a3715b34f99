"""Every test of the model runs for each member of the family that it asks for."""

import pytest

from hsa_compile.model.config import VARIANTS


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    """Each member of the family."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache for the tests of a process, so that a C++ kernel is built once; not the user's."""
    monkeypatch.setenv("HSA_COMPILE_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "model-cache"))


@pytest.fixture
def compiler() -> None:
    """The test asks for kernels in C++, where the machine can build them."""


@pytest.fixture(autouse=True)
def _kernels_without_compiler(request: pytest.FixtureRequest) -> None:
    """Kernels are PyTorch, the same on every CPU: to build C++ for each shape takes seconds, and its own tests do."""
    if "compiler" not in request.fixturenames:
        request.getfixturevalue("without_compiler")
