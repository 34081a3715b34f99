"""Candidates that run nothing and clocks that only tests move."""

from collections.abc import Callable, Iterator

import pytest

from hsa_compile.autotune.bench.bench import Candidate
from hsa_compile.paths import cxx_compiler
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import Target, this_cpu


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


class FakeClock:
    """Stands in for the `time` module: `monotonic` is whatever was added up so far."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def cpu() -> Target:
    return Target(kind="cpu", name="Test CPU", arch="avx2", num_cores=2)


@pytest.fixture
def fake_candidate() -> Callable[[Schedule], Candidate]:
    def make(schedule: Schedule) -> Candidate:
        def call() -> object:
            raise AssertionError(f"{schedule} must not be run here")

        return Candidate(schedule=schedule, fingerprint=str(schedule), call=call)

    return make
