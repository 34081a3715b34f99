"""Who takes part in a contest: our ops first, then what people use today, and functions that a person names."""

import importlib.util
import inspect
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from hsa_compile.comparison import BOTH, DECODE, FAMILIES, FORWARD, SELECT
from hsa_compile.comparison.baselines import dense_contenders, flex_contenders, nsa_contenders
from hsa_compile.comparison.contender import FOREIGN_ERRORS, Case, Contender, name_and_message
from hsa_compile.comparison.same_function import Function, gather_contenders, same_function
from hsa_compile.errors import InvalidArgument
from hsa_compile.kernels.hsa_attention.op import hsa_attention
from hsa_compile.kernels.hsa_decode.op import hsa_decode
from hsa_compile.kernels.select_chunks.op import select_chunks
from hsa_compile.schedules.cache import tuned_for
from hsa_compile.schedules.space import default_schedule
from hsa_compile.target import Target

OURS = "hsa-compile"


def contenders_for(device: torch.device, families: Sequence[str] = FAMILIES) -> list[Contender]:
    """Returns ours, which run through the public ops on the schedules that lookup gives, and those of the families."""
    made = {
        "sdpa": dense_contenders(device),
        "flex": flex_contenders(),
        "gather": gather_contenders(),
        "nsa": nsa_contenders(),
    }
    rivals = [contender for name in FAMILIES if name in families for contender in made[name]]
    return [replace(same_function(OURS, _ours), note=_schedules), *rivals]


def _ours(case: Case) -> Function:
    functions: dict[str, Function] = {SELECT: select_chunks, DECODE: hsa_decode}
    return functions.get(case.kind, hsa_attention)


def _schedules(case: Case) -> str:
    """Says which schedules run, and where they are from."""
    target = Target.of(case.device)
    texts = []
    for op in case.ops:
        problem = case.problem.with_op(op)
        found = tuned_for(problem, target)
        how = f"{found.origin}, distance {found.distance:.2g}" if found else "default"
        texts.append(f"{op}: {found.schedule if found else default_schedule(problem, target)} ({how})")
    return "; ".join(texts)


# Each kind is called with so many tensors and these keywords, as `same_function.arguments` gives them.
_CALLS = {
    FORWARD: (5, ("chunk_size",)),
    BOTH: (5, ("chunk_size",)),
    SELECT: (2, ("chunk_size", "top_k")),
    DECODE: (5, ("page_table",)),
}
_SIGNATURES = (
    "(q, k, v, chunk_indices, chunk_weights, *, chunk_size) of hsa_attention, "
    "(query, landmarks, *, chunk_size, top_k) of select_chunks, "
    "(q, k_chunks, v_chunks, chunk_indices, chunk_weights, *, page_table) of hsa_decode"
)


def load_contender(text: str, kinds: Sequence[str]) -> Contender:
    """Loads the contender that a person named; it takes part in the kinds of cases that it can be called for.

    Args:
        text: `FILE.py:function`.
        kinds: the kinds of cases that there will be.

    Raises:
        InvalidArgument: there is no such file or function, the file cannot be imported, or the function takes the
            arguments of none of the ops.
    """
    place, _, name = text.rpartition(":")
    path = Path(place).expanduser()
    if not place or not name:
        raise InvalidArgument(f"contender {text!r} is not FILE.py:function")
    if not path.is_file():
        raise InvalidArgument(f"contender {text!r}: there is no file {str(path)!r}")
    function = _function(path, name)
    fitting = tuple(kind for kind in kinds if _fits(function, kind))
    if not fitting:
        raise InvalidArgument(
            f"contender {text!r} takes {inspect.signature(function)}, which is none of what is timed; allowed are "
            f"{_SIGNATURES}"
        )
    return same_function(f"{path.name}:{name}", lambda case: function, kinds=fitting)


def _function(path: Path, name: str) -> Function:
    module_name = f"hsa_compile_contender_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise InvalidArgument(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # Triton and dataclasses look modules up by name
    try:
        spec.loader.exec_module(module)
    except FOREIGN_ERRORS as error:
        del sys.modules[module_name]
        raise InvalidArgument(f"{path} cannot be imported: {name_and_message(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise InvalidArgument(f"{path} has no function {name!r}; it has {', '.join(own) or 'none'}")
    return function


def _fits(function: Function, kind: str) -> bool:
    num_tensors, keywords = _CALLS[kind]
    try:
        inspect.signature(function).bind(*[None] * num_tensors, **dict.fromkeys(keywords))
    except TypeError:
        return False
    return True
