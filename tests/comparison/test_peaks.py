"""The roofs of a device."""

import pytest

from hsa_compile.comparison import peaks as module
from hsa_compile.comparison.peaks import Peaks, peaks_of
from hsa_compile.errors import InvalidArgument
from hsa_compile.target import Target


def test_the_lower_roof_bounds() -> None:
    peaks = Peaks(tflops=100.0, gb_s=1000.0, source="a guess")
    assert peaks.attainable_tflops(10.0) == pytest.approx(10.0)  # 10 FLOPs a byte at 1 TB/s
    assert peaks.attainable_tflops(1000.0) == 100.0


def test_of_two_measurements_the_best_of_each_roof_counts() -> None:
    first, second = Peaks(tflops=1.0, gb_s=20.0, source="a"), Peaks(tflops=2.0, gb_s=10.0, source="a")
    assert first.or_better(second) == Peaks(tflops=2.0, gb_s=20.0, source="a")


def test_a_gpu_has_those_of_its_data_sheet_and_an_unknown_one_none() -> None:
    h100 = Target.parse("h100")
    sixteen_bits, thirty_two = peaks_of(h100, "bfloat16"), peaks_of(h100, "float32")
    assert sixteen_bits is not None
    assert thirty_two is not None
    assert sixteen_bits.tflops > 10 * thirty_two.tflops
    assert peaks_of(h100, "float64") is None
    assert peaks_of(Target(kind="cuda", name="a card", arch="sm_75", num_cores=40), "float16") is None


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PRODUCTS", ((32, 2), (64, 1)))
    monkeypatch.setattr(module, "_COPY_BYTES", 1 << 20)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_those_of_a_cpu_are_measured(dtype: str) -> None:
    found = peaks_of(Target.parse("cpu"), dtype)
    assert found is not None
    assert found.tflops > 0
    assert found.gb_s > 0
    assert found.source == f"measured: {dtype} products of 32² and 64² matrices, copies of 1 MiB"


@pytest.mark.usefixtures("_small")
def test_a_dtype_without_fast_products_is_measured_by_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SLOW_S", 0.0)
    found = peaks_of(Target.parse("cpu"), "float32")
    assert found is not None
    assert "float32 products of 32² matrices" in found.source


def test_a_roof_is_positive() -> None:
    with pytest.raises(InvalidArgument, match=r"gb_s = 0\.0 must be a number in"):
        Peaks(tflops=1.0, gb_s=0.0, source="a guess")
