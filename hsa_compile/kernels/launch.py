"""Launches the Triton kernels of an emitted module: what Triton works out anew at every launch is remembered.

Triton turns options into text, reads its settings, compares the module's constants with what they were, and calls hooks
that are not there, at every launch; on a small decoding step that takes longer than the kernels. What decides which
compiled kernel is right, the types of the arguments and what is specialised on (whether an address or a stride is a
multiple of 16, for one), is still asked of Triton at every launch.
"""

import functools
from collections.abc import Callable, Hashable
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triton import JITFunction

# The versions of Triton whose compiled kernels are run as below; any other one launches in its own way.
KNOWN_VERSIONS = ("3.6.", "3.7.")

Grid = tuple[int, ...]


def quicken(module: ModuleType) -> None:
    """Replaces the kernels of an emitted Triton module that it launches by those that are launched quickly."""
    for launch in module.LAUNCHES:
        kernel, name = launch["kernel"], launch["kernel"].__name__
        if vars(module).get(name) is kernel:  # the others belong to modules that quicken their own
            setattr(module, name, quick(kernel))


def quick(kernel: Any) -> Any:
    """Returns a Triton kernel in the form that is launched quickly.

    Kernels of Triton's interpreter, and those of a version of Triton that is not known, stay as they are.
    """
    import triton

    if isinstance(kernel, triton.JITFunction) and triton.__version__.startswith(KNOWN_VERSIONS):
        return QuickKernel(kernel)
    return kernel


class QuickKernel:
    """A Triton kernel that is launched as any other, `kernel[grid](*arguments, **options)`.

    Args:
        kernel: the kernel. Its first launch of each kind, and every launch that somebody watches with hooks, as
            profilers do, is Triton's own.
    """

    def __init__(self, kernel: "JITFunction") -> None:
        from triton import knobs
        from triton.compiler import CompiledKernel
        from triton.runtime import driver

        self.kernel = kernel
        self._knobs, self._driver, self._compiled_type = knobs, driver, CompiledKernel
        self._compiled: dict[Hashable, tuple[Callable[..., None], Any, Any]] = {}

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: Grid, *args: Any, **options: Any) -> None:
        kernel, runtime, driver = self.kernel, self._knobs.runtime, self._driver.active
        if (
            _is_set(runtime.launch_enter_hook)
            or _is_set(runtime.launch_exit_hook)
            or kernel.pre_run_hooks
            or runtime.add_stages_inspection_hook is not None
        ):
            kernel[grid](*args, **options)
            return
        device = driver.get_current_device()
        binder = kernel.device_caches[device][4]
        bound, specialization, rest = binder(*args, **options)
        key = (
            device, runtime.debug, self._knobs.compilation.instrumentation_mode, *specialization, *rest.items()
        )  # fmt: skip
        known = self._compiled.get(key)
        if known is None:
            compiled = kernel[grid](*args, **options)
            if isinstance(compiled, self._compiled_type):
                self._compiled[key] = (compiled.run, compiled.function, compiled.packed_metadata)
            return
        run, function, metadata = known
        x, y, z = (*grid, 1, 1)[:3]
        # No hook is called, so there is nothing that one would be told.
        run(x, y, z, driver.get_current_stream(device), function, metadata, None, None, None, *bound.values())


def _is_set(hook: Any) -> bool:
    """Whether a hook calls anything: Triton's are chains, empty as a rule; whoever sets one may set any callable."""
    return hook is not None and bool(getattr(hook, "calls", True))
