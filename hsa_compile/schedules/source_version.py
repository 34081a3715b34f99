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
    """Digests the templates in the op's own folder and in `parts`, which all ops share."""
    digest = hashlib.sha256()
    folder = TEMPLATE_DIR / backend
    for path in sorted(folder.rglob("*.jinja")):
        name = path.relative_to(folder).as_posix()
        if name.partition("/")[0] in (op, "parts"):
            digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
