"""A digest of the templates that a schedule was tuned for, since another kernel text has another best schedule."""

import functools
import hashlib

from hsa_compile.paths import TEMPLATE_DIR
from hsa_compile.problem import Problem
from hsa_compile.schedules.ops import backend_for
from hsa_compile.target import Target


def source_version(problem: Problem, target: Target) -> str:
    """Returns 12 hex digits that stand for the templates of a problem's op on a target."""
    return _digest(backend_for(problem, target), problem.op)


@functools.cache
def _digest(backend: str, op: str) -> str:
    """Digests the op's own templates and those that all ops share, whose names begin with an underscore."""
    digest = hashlib.sha256()
    for path in sorted((TEMPLATE_DIR / backend).glob("*.jinja")):
        # `hsa_forward_chunk.py.jinja`: the op, then a dataflow without underscores.
        if path.name.startswith("_") or path.name.rpartition("_")[0] == op:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
