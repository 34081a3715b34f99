"""Commands run on this CPU, and most of them without its C++ compiler."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from shell import Shell, record_of

from hsa_compile.model.config import ModelConfig
from hsa_compile.model.presets import preset
from hsa_compile.model.pretrained import save_pretrained
from hsa_compile.model.transformer import HSATransformer
from hsa_compile.paths import cxx_compiler
from hsa_compile.problem import OPS
from hsa_compile.schedules.cache import default_cache
from hsa_compile.target import this_cpu


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@pytest.fixture
def stored() -> None:
    """Entries for both ops of the tiny problem."""
    for op in OPS:
        default_cache().put(record_of(op))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model that knows nothing, in the folder of a run."""
    torch.manual_seed(0)
    sizes = {"dim": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "memory_heads": 2, "memory_head_dim": 8,
             "retrieval_dim": 8, "ffn_dim": 16, "encoder_ffn_dim": 16, "num_experts": 0}  # fmt: skip
    path = tmp_path_factory.mktemp("run") / "model"
    save_pretrained(HSATransformer(ModelConfig.from_dict(preset("tiny").to_dict() | sizes)), path)
    return path


@pytest.fixture(autouse=True)
def _no_compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU kernels are PyTorch here: to build C++ takes seconds. A test that wants it asks for `compiler`."""
    if "compiler" not in request.fixturenames:
        monkeypatch.setenv("CXX", "there-is-no-such-compiler")
    this_cpu.cache_clear()
    yield
    this_cpu.cache_clear()


@pytest.fixture
def compiler() -> tuple[str, ...]:
    """The machine's own C++ compiler."""
    found = cxx_compiler()
    if found is None:
        pytest.skip("no C++ compiler")
    return found
