"""Training tests run one product after the other on one thread: with several a sum may change its order."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hsa_compile.model.training import metrics
from hsa_compile.model.training.processes import Processes

# The helpers of the model's tests lie one folder up.
sys.path.insert(0, str(Path(__file__).parent.parent))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_tensorboard(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """To import it takes seconds; a test that wants it asks for `tensorboard`."""
    if "tensorboard" not in request.fixturenames:
        monkeypatch.setattr(metrics, "_tensorboard", lambda directory: None)


@pytest.fixture
def tensorboard() -> None:
    """The package itself."""
    pytest.importorskip("tensorboard")


@pytest.fixture
def alone() -> Processes:
    """One process on the CPU."""
    return Processes(device=torch.device("cpu"))
