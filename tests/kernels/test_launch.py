"""Launches of Triton kernels, on a device that is not there: nothing is compiled, and each launch is noted."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hsa_compile.kernels.launch import QuickKernel, quicken

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402


class Compiled(CompiledKernel):
    """What Triton would have compiled: the types and what is specialised on; a launch of it is noted."""

    def __init__(self, kind: tuple[object, ...], device: int, launches: list[Any]) -> None:
        self.kind, self.device, self.name = kind, device, "add"
        self.function, self.packed_metadata, self.src, self._launches = device, ("packed",), None, launches

    def _init_handles(self) -> None: ...

    @property
    def run(self) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, stream: int, function: int, packed: object, *rest: Any) -> None:
            metadata, enter, leave, *arguments = rest
            assert (function, packed) == (self.device, self.packed_metadata)
            for hook in (enter, leave):
                if hook is not None:
                    hook(metadata)
            places = tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments)
            self._launches.append((self.kind, (x, y, z), stream, places))

        return launch


class Device(SimpleNamespace):
    """The driver of two devices, the first of which is current."""

    current = 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.current

    def get_current_stream(self, device: int) -> int:
        return 100 + device


def add(x, y, scale, stride, size, BLOCK: tl.constexpr): ...


class Launches(SimpleNamespace):
    """A kernel in both forms; `same` launches both, and returns what the quick one did."""

    def same(self, *arguments: Any, grid: tuple[int, ...] = (3, 2), **options: Any) -> Any:
        before = len(self.noted)
        for kernel in (self.plain, self.quick):
            kernel[grid](*arguments, **options)
        plain, quick = self.noted[before:]
        assert quick == plain
        return quick


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    noted, compilations = [], []

    def compile_(kernel: Any, key: object, signature: Any, device: int, constants: Any, options: Any, attrs: Any, _):
        kind = (tuple(signature.values()), str(attrs), str(constants), options.num_warps, options.debug)
        compilations.append(kind)
        compiled = kernel.device_caches[device][0][key] = Compiled(kind, device, noted)
        return compiled

    jit_function = triton.runtime.jit.JITFunction  # `triton.jit` would give an interpreted one here
    plain, quick = (jit_function(add, do_not_specialize=("size",)) for _ in range(2))
    device = Device()
    monkeypatch.setattr(jit_function, "_do_compile", compile_)
    active = triton.runtime.driver.active if triton.runtime.driver._active else None
    triton.runtime.driver.set_active(device)
    yield Launches(plain=plain, quick=QuickKernel(quick), noted=noted, compilations=compilations, device=device)
    triton.runtime.driver.set_active(active)


X, Y = torch.zeros(64), torch.zeros(64, dtype=torch.bfloat16)


def test_launches_after_the_first_are_what_tritons_would_be(launches: Launches) -> None:
    for grid in ((5,), (5, 1), (2, 3, 4), (5,)):
        kind, launched, stream, _ = launches.same(X, Y, 0.5, 32, 7, 16, grid=grid, num_warps=4)
        assert (launched, stream) == ((*grid, 1, 1)[:3], 100)
    assert kind[0] == ("*fp32", "*bf16", "fp32", "i32", "i32", "constexpr")
    assert len(launches.compilations) == 2  # one for each form of the kernel


def test_what_is_specialised_on_has_kernels_of_its_own(launches: Launches) -> None:
    first = launches.same(X, Y, 0.5, 32, 7, 16)
    others = (
        (X[1:], Y, 0.5, 32, 7, 16),  # an address that is no multiple of 16 bytes
        (X, Y[4:], 0.5, 32, 7, 16),
        (X.double(), Y, 0.5, 32, 7, 16),
        (X, Y, 0.5, 33, 7, 16),  # a stride that is no multiple of 16
        (X, Y, 0.5, 1, 7, 16),
        (X, Y, 0.5, 32, 2**40, 16),
        (X, Y, 0.5, 32, 7, 32),
    )
    kinds = {launches.same(*arguments)[0] for arguments in others}
    assert len(kinds) == len(others)
    assert first[0] not in kinds
    assert launches.same(X[4:], Y[8:], 0.25, 64, 8, 16)[0] == first[0]
    assert launches.same(X, Y, 0.5, 32, 7, 16) == first
    assert launches.same(X, Y, 0.5, 32, 7, 16, num_warps=8)[0] != first[0]


def test_each_device_has_its_own_kernel_and_stream(launches: Launches) -> None:
    for device in (0, 1, 0):
        launches.device.current = device
        assert launches.same(X, Y, 0.5, 32, 7, 16)[2] == 100 + device  # `Compiled` checks whose function it is given


def test_hooks_see_every_launch(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    def launch() -> list[str]:
        seen.clear()
        launches.quick[(1,)](X, Y, 0.5, 32, 7, 16)
        return seen.copy()

    def enter(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    def leave(metadata: Any) -> None:
        seen.append("left")

    seen: list[str] = []
    assert launch() == launch() == []
    knobs.runtime.launch_enter_hook.add(enter)
    assert launch() == ["add"]
    knobs.runtime.launch_enter_hook.remove(enter)
    knobs.runtime.launch_exit_hook.add(leave)
    assert launch() == ["left"]
    knobs.runtime.launch_exit_hook.remove(leave)
    assert launch() == []
    with monkeypatch.context() as replaced:
        replaced.setattr(knobs.runtime, "launch_enter_hook", enter)  # no chain of hooks, but one
        assert launch() == ["add"]
    launches.quick.kernel.add_pre_run_hook(lambda *_, **__: seen.append("before"))
    assert launch() == ["before"]


def test_a_setting_that_changes_what_is_compiled_is_heeded(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launches.same(X, Y, 0.5, 32, 7, 16)[0][-1] is False
    monkeypatch.setattr(knobs.runtime, "debug", True)
    assert launches.same(X, Y, 0.5, 32, 7, 16)[0][-1] is True


def test_kernels_of_an_unknown_version_and_interpreted_ones_stay_as_they_are(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreted, foreign = SimpleNamespace(__name__="interpreted"), SimpleNamespace(__name__="of_another_module")
    kernels = (launches.plain, interpreted, foreign)
    module = SimpleNamespace(
        add=launches.plain, interpreted=interpreted, LAUNCHES=tuple({"kernel": kernel} for kernel in kernels)
    )
    with monkeypatch.context() as later:
        later.setattr(triton, "__version__", "4.0.0")
        quicken(module)
    assert module.add is launches.plain
    quicken(module)
    assert isinstance(module.add, QuickKernel)
    assert module.interpreted is interpreted
    assert not hasattr(module, "of_another_module")
