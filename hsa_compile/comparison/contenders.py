"""Who takes part: ours first, then what people use today."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from hsa_compile.comparison.case import Case
from hsa_compile.comparison.choices import DECODE, FAMILIES, SELECT
from hsa_compile.comparison.contender import Contender
from hsa_compile.comparison.dense import dense_contenders
from hsa_compile.comparison.flex import flex_contenders
from hsa_compile.comparison.gather import gather_contenders
from hsa_compile.comparison.nsa import nsa_contenders
from hsa_compile.comparison.same_function import Function, same_function
from hsa_compile.kernels.hsa_attention import hsa_attention
from hsa_compile.kernels.hsa_decode import hsa_decode
from hsa_compile.kernels.select_chunks import select_chunks
from hsa_compile.schedules.cache import tuned_for
from hsa_compile.schedules.default import default_schedule
from hsa_compile.target import Target

OURS = "hsa-compile"


def contenders_for(device: torch.device, families: Sequence[str] = FAMILIES) -> list[Contender]:
    """Ours, through the public ops and so on the schedules that lookup gives, and those of the families."""
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
    """Which schedules run, and where they are from."""
    target = Target.of(case.device)
    texts = []
    for op in case.ops:
        problem = case.problem.with_op(op)
        found = tuned_for(problem, target)
        how = f"{found.origin}, distance {found.distance:.2g}" if found else "default"
        texts.append(f"{op}: {found.schedule if found else default_schedule(problem, target)} ({how})")
    return "; ".join(texts)
