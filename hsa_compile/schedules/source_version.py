"""Which kernel text a schedule was tuned for: a digest of the templates, since other text has another best schedule."""

import functools
import hashlib

from hsa_compile.paths import TEMPLATE_DIR
from hsa_compile.problem import Problem
from hsa_compile.schedules.ops import backend_for
from hsa_compile.target import Target


def source_version(problem: Problem, target: Target) -> str:
    """12 hex digits of what the kernels of a problem's op are emitted from on a target."""
    return _digest(backend_for(problem, target), problem.op)


@functools.cache
def _digest(backend: str, op: str) -> str:
    """The digest of the op's own templates and of those that all ops share, whose names begin with an underscore."""
    digest = hashlib.sha256()
    for path in sorted((TEMPLATE_DIR / backend).glob("*.jinja")):
        # `hsa_forward_chunk.py.jinja`: the op, then a dataflow without underscores.
        if path.name.startswith("_") or path.name.rpartition("_")[0] == op:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
