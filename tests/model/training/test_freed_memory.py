"""Memory that a process has freed stays with it."""

import platform
import subprocess
import sys

import pytest

_PAGES_OF_TEN_BLOCKS = """
import resource
from hsa_compile.model.training.freed_memory import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
count = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
import torch
for _ in range(2):
    before = count()
    for _ in range(10):
        torch.ones(2**24)
print(count() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such settings")
def test_what_was_freed_is_not_mapped_again() -> None:
    faults = {}
    for keep in (False, True):
        command = [sys.executable, "-c", _PAGES_OF_TEN_BLOCKS.format(keep=keep)]
        faults[keep] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert faults[False] > 100  # ten times 64 MiB, be the pages as large as they may
    assert faults[True] < faults[False] / 10
