"""Memory that a process has freed stays with it."""

import platform
import subprocess
import sys

import pytest

_FAULTS_OF_TEN_BLOCKS = """
import ctypes, resource, torch
from hsa_compile.cli.models.argument import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        block = libc.malloc(ctypes.c_size_t(2**26))
        ctypes.memset(block, 1, 2**26)
        libc.free(ctypes.c_void_p(block))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
given_back = faults()
assert not keep_freed_memory(torch.device("meta"))
assert keep_freed_memory(torch.device("cpu"))
faults()
print(given_back, faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such settings")
def test_what_was_freed_is_not_mapped_again() -> None:
    command = [sys.executable, "-c", _FAULTS_OF_TEN_BLOCKS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert given_back > 100  # ten times 64 MiB, be the pages as large as they may
    assert kept < given_back / 10
