"""`--preset NAME`: the problems that a model of ours asks the cache for."""

from collections.abc import Mapping, Sequence
from typing import Any

from hsa_compile.cli.model_argument import config_of
from hsa_compile.errors import InvalidArgument
from hsa_compile.model.workload import problems
from hsa_compile.problem import Problem
from hsa_compile.target import Target

# A step that keeps the device busy: texts in a batch, tokens of a text.
_CPU_STEP, _GPU_STEP = (4, 2048), (1, 16384)


def preset_problems(
    name: str, target: Target, chosen: Mapping[str, Sequence[Any]] | None = None, *, variant: str | None = None
) -> list[Problem]:
    """What a model asks for in training and in reading, each problem once.

    Args:
        name: of a preset, or the directory of a saved model.
        target: that decides what is not chosen: float32 on a CPU, bfloat16 on a GPU, and the size of a step.
        chosen: values of `batch`, `seq_len` and `dtype`; several make several steps.
        variant: of a preset.

    Raises:
        InvalidArgument: the model is not known, has no memory, or something else is chosen.
    """
    chosen = dict(chosen or {})
    on_cpu = target.kind == "cpu"
    batch, seq_len = _CPU_STEP if on_cpu else _GPU_STEP
    batches, lengths = chosen.pop("batch", [batch]), chosen.pop("seq_len", [seq_len])
    dtypes = chosen.pop("dtype", ["float32" if on_cpu else "bfloat16"])
    if chosen:
        flags = ", ".join(f"--{field.removeprefix('num_').replace('_', '-')}" for field in chosen)
        raise InvalidArgument(f"--preset {name} decides on {flags}; with it --batch, --seq-len and --dtype are allowed")
    config = config_of(name, variant)
    found: dict[Problem, None] = {}
    for b in batches:
        for length in lengths:
            for dtype in dtypes:
                for training in (True, False):
                    found |= dict.fromkeys(problems(config, b, length, dtype, training=training))
    if not found:
        raise InvalidArgument(
            f"--preset {name} as {config.variant} with texts of {', '.join(map(str, lengths))} tokens asks for no "
            f"kernel of ours; a variant with a memory and texts longer than a chunk, {config.chunk_size}, do"
        )
    return list(found)
