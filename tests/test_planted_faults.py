"""The faults that `planted_faults.py` plants still fit the files that they are meant for."""

from pathlib import Path

from planted_faults import FAULTS, ROOT, Fault, read_faults


def _why_unfit(fault: Fault) -> str:
    path = ROOT / fault.file
    if not path.is_file():
        return f"there is no file {fault.file}"
    count = path.read_text(encoding="utf-8").count(fault.find)
    if count != 1:
        return f"its text stands {count} times in {fault.file}"
    if fault.find == fault.replace:
        return "it changes nothing"
    missing = [test for test in fault.tests if not _exists(test)]
    return f"it names tests that are not there: {missing}" if missing or not fault.tests else ""


def _exists(test: str) -> bool:
    """Whether there is a folder, a file, or in it the function that `FILE::FUNCTION` names."""
    name, _, function = test.partition("::")
    path = ROOT / name
    return path.is_dir() or (path.is_file() and f"def {function}" in path.read_text(encoding="utf-8"))


def test_each_fault_can_be_planted() -> None:
    unfit = {fault.name: why for fault in read_faults() if (why := _why_unfit(fault))}
    assert not unfit


def test_there_are_faults_all_over_the_product() -> None:
    faults = read_faults()
    assert len({fault.name for fault in faults}) == len(faults) >= 30
    folders = {Path(fault.file).parts[1] for fault in faults}
    assert {"kernels", "schedules", "autotune", "model", "cli"} <= folders, FAULTS
