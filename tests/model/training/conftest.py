"""Training tests run one product after the other on one thread: with several a sum may change its order."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hsa_compile.model.training.processes import Processes

# The helpers of the model's tests lie one folder up.
sys.path.insert(0, str(Path(__file__).parent.parent))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def alone() -> Processes:
    """One process on the CPU."""
    return Processes(device=torch.device("cpu"))
