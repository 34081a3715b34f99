"""What the tests of the ops share."""

import importlib.util
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from hsa_compile.kernels.compile import Kernel
from hsa_compile.paths import cxx_compiler
from hsa_compile.target import this_cpu


@pytest.fixture(autouse=True)
def _sort_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter sorts by networks of Python calls, a thousand keys in seconds; here NumPy does it."""
    if importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    networks = tl.sort

    def sort(x: tl.tensor, *options: object, **named: object) -> tl.tensor:
        if options or named:
            return networks(x, *options, **named)
        return tl.tensor(TensorHandle(np.sort(x.handle.data), x.handle.dtype), x.type)

    monkeypatch.setattr(tl, "sort", sort)


@pytest.fixture
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Which kernels serve the CPU in this test.

    `torch`; `cpp-own`, C++ for the vector extension that the CPU has; or `cpp`, C++ for AVX2 where the CPU executes
    that, which builds in half the time of AVX-512.
    """
    if request.param == "torch":
        monkeypatch.setattr("hsa_compile.target.cxx_compiler", lambda: None)
    elif cxx_compiler() is None:
        pytest.skip("there is no C++ compiler")
    if request.param == "cpp" and torch.backends.cpu.get_cpu_capability() == "AVX512":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    this_cpu.cache_clear()
    yield request.param
    this_cpu.cache_clear()


@pytest.fixture
def scales_in_kernels(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The scale that each call of a kernel gets, from now on."""
    run, seen = Kernel.run, list[float]()
    monkeypatch.setattr(
        Kernel, "run", lambda self, *args, **more: seen.append(more["scale"]) or run(self, *args, **more)
    )
    return seen
