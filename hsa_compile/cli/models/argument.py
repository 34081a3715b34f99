"""`PRESET|DIR`: how commands name a model, and the device, dtype and processes that they load it to."""

import contextlib
import ctypes
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hsa_compile.cli.options import DTYPE_ALIASES
from hsa_compile.errors import InvalidArgument
from hsa_compile.model.config import VARIANTS, ModelConfig
from hsa_compile.model.data.tokenizer import BYTES, Tokenizer, load_tokenizer
from hsa_compile.model.presets import PRESETS, preset
from hsa_compile.model.pretrained import from_pretrained, read_config, read_extra, read_tokenizer
from hsa_compile.model.transformer import HSATransformer
from hsa_compile.paths import CHECKPOINT_DIR
from hsa_compile.target import gpu_index

# These are the numbers of settings in glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_SETTINGS = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 * 2**20))


def config_of(model: str, variant: str | None) -> ModelConfig:
    """Returns the config of a preset or of a saved model.

    Args:
        model: the name of a preset, or a directory.
        variant: which variant of the preset is meant; None for `hsa-ultralong`.

    Raises:
        InvalidArgument: `model` is neither a preset nor a directory, or a variant is named for a saved model.
    """
    if model in PRESETS:
        return preset(model, variant or VARIANTS[0])
    if not Path(model).is_dir():
        raise InvalidArgument(f"model {model!r} is neither a directory nor one of the presets {', '.join(PRESETS)}")
    if variant is not None:
        raise InvalidArgument(f"--variant {variant} is for presets; {model} is a saved model with a variant of its own")
    return read_config(Path(model))


def load_model(
    name: str, variant: str | None, *, device: torch.device, dtype: str | None, random_seed: int | None = None
) -> tuple[HSATransformer, Tokenizer]:
    """Loads a model in evaluation mode, and its tokenizer.

    Args:
        name: the directory of a saved model, or a preset: one that is shipped trained, unless weights are random.
        variant: which variant of the preset is meant, with random weights.
        device: where the weights are put.
        dtype: the name of the dtype that the weights get; the saved one if None.
        random_seed: the seed by which a preset's weights are drawn; None for trained ones.

    Raises:
        InvalidArgument: for the reasons of `config_of`, or there are no trained weights of a preset.
        SaveError: the saved model is damaged or foreign, or has weights that are not finite in the dtype.
    """
    chosen = getattr(torch, DTYPE_ALIASES.get(dtype, dtype)) if dtype is not None else None
    config = config_of(name, variant)
    if name in PRESETS and random_seed is not None:
        torch.manual_seed(random_seed)
        return HSATransformer(config).to(device, chosen or torch.float32).eval(), load_tokenizer(BYTES)
    directory = saved_in(name)
    if variant not in (None, VARIANTS[0]) or not directory.is_dir():
        raise InvalidArgument(
            f"model {name!r}{f' as {variant}' if variant else ''} has no trained weights; allowed are "
            f"{', '.join(sorted(path.name for path in CHECKPOINT_DIR.iterdir()))} and the directory of a model"
        )
    tokenizer = read_tokenizer(directory)
    model = from_pretrained(directory, device=device, dtype=chosen)
    return model, load_tokenizer(BYTES if tokenizer == BYTES else directory / tokenizer)


def saved_in(name: str) -> Path:
    """Returns the directory of a saved model, or where a preset's trained weights are if it is shipped with some."""
    return CHECKPOINT_DIR / name if name in PRESETS else Path(name)


def trained_on(name: str) -> str:
    """Returns the corpus that a saved model was trained on, as its run named it; empty if it does not say."""
    training = read_extra(saved_in(name)).get("training", {})
    return str(training.get("config", {}).get("data", {}).get("corpus", ""))


def device_of(name: str) -> torch.device:
    """Returns the device that a person named; `auto` is a GPU if there is one.

    Raises:
        InvalidArgument: the device is not known or not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    index = gpu_index(name)
    if name not in ("cpu", "cuda") and index is None:
        raise InvalidArgument(f"device {name!r} is not known; allowed are auto, cpu, cuda, cuda:N")
    if name != "cpu" and (index or 0) >= torch.cuda.device_count():
        raise InvalidArgument(
            f"device {name!r} is not here; allowed are auto, cpu"
            + "".join(f", cuda:{i}" for i in range(torch.cuda.device_count()))
        )
    return torch.device(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Readers:
    """This process, alone or among those that read texts together.

    Attributes:
        device: what it runs on.
        mesh: all of them; None if it is alone.
    """

    device: torch.device
    mesh: DeviceMesh | None = None

    @property
    def is_first(self) -> bool:
        """Whether this one prints, and reads and writes files of results."""
        return self.mesh is None or self.mesh.get_rank() == 0

    def from_first(self, value: Any) -> Any:
        """Returns the value that the first process gave."""
        if self.mesh is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]


def keep_freed_memory(device: torch.device) -> bool:
    """Tells the C library to keep what is freed, for the rest of a process that computes on a CPU, if it is glibc.

    By default glibc gives large blocks back at once, so each step of a training on a CPU, and each piece of a text that
    is read, has its activations mapped and zeroed anew: 5 % of the CPU time of training `tiny`, 9 % of that of
    evaluating it. What the process holds at most stays the same.

    Returns:
        whether the C library accepted all of it.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return sum(libc.mallopt(name, value) for name, value in _SETTINGS) == len(_SETTINGS)


@contextlib.contextmanager
def joined_readers(device: str) -> Iterator[Readers]:
    """Joins the others that `torchrun` started, if it did, and leaves them at the end.

    Args:
        device: as `device_of` takes it.

    Raises:
        InvalidArgument: one device is named, and there are several processes.
        TrainingError: another process ended while this one waited for it.
    """
    own = device_of(device)
    if not dist.is_torchelastic_launched():
        yield Readers(device=own)
        return
    from hsa_compile.model.training.processes import join_processes, leave_processes, saying_who_is_gone

    if own.index is not None:
        raise InvalidArgument(
            f"--device {device} is one device; torchrun's processes each take their own: auto, cpu or cuda is needed"
        )
    processes = join_processes()
    try:
        with saying_who_is_gone(processes, "the same command begins again"):
            mesh = init_device_mesh(own.type, (processes.world_size,)) if processes.world_size > 1 else None
            yield Readers(device=processes.device if own.type == "cuda" else own, mesh=mesh)
    finally:
        leave_processes()
