import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hsa_compile import target as target_module
from hsa_compile.checks import shown
from hsa_compile.errors import InvalidTarget
from hsa_compile.paths import cxx_compiler
from hsa_compile.target import KINDS, NAMED_TARGETS, Target, cpu_multiplies_bfloat16

FIELDS: dict[str, Any] = {"kind": "cpu", "name": "Some CPU @ 3.0GHz", "arch": "avx512", "num_cores": 4}
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("kind", "tpu", ", ".join(KINDS)),
        ("num_cores", 0, "in 1 … 1048576"),
        ("num_cores", 10**400, "in 1 … 1048576"),
        ("name", "\ud800", "printable characters"),
    ],
)
def test_a_bad_field_is_named_with_its_value_and_what_is_allowed(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(InvalidTarget) as caught:
        Target(**{**FIELDS, field: value})
    message = str(caught.value)
    assert f"{field} = {shown(value)}" in message
    assert message.endswith(allowed)


@pytest.mark.parametrize(
    ("name", "kind", "warp_size"),
    [("sm_80", "cuda", 32), ("sm_90", "cuda", 32), ("sm_100", "cuda", 32), ("gfx942", "hip", 64)],
)
def test_an_architecture_can_be_named_without_its_device(name: str, kind: str, warp_size: int) -> None:
    target = Target.parse(name)
    assert (target.kind, target.arch, target.warp_size) == (kind, name, warp_size)
    assert target.shared_memory > 0
    assert not target.has_compiler


def test_the_cpu_counts_the_threads_of_this_process() -> None:
    target = Target.parse("cpu")
    assert (target.kind, target.shared_memory, target.warp_size) == ("cpu", 0, 1)
    assert target.has_compiler == (cxx_compiler() is not None)
    assert target.num_cores == torch.get_num_threads()
    assert target == Target.of(torch.device("cpu"))


@without_gpu
def test_auto_is_the_cpu_where_there_is_no_gpu() -> None:
    assert Target.parse("auto") == Target.current() == Target.parse("cpu")


@without_gpu
@pytest.mark.parametrize("name", ["cuda:0", "cuda:17", "cuda:999"])
def test_a_gpu_that_is_not_present_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(InvalidTarget, match=rf"'{name}' is not present.*use cpu"):
        Target.parse(name)


@without_gpu
def test_the_current_gpu_is_refused_as_any_other_where_there_is_none() -> None:
    with pytest.raises(InvalidTarget, match=r"'cuda:0' is not present.*use cpu"):
        Target.parse("cuda")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "CPU ",
        "gpu",
        "sm_99",
        "gfx1100",
        "cuda:",
        "cuda:-1",
        "cuda:x",
        "cuda:01",
        "cuda:1000",
        "cuda:٣",
        "mps",
        "cpu:0",
    ],
)
def test_an_unknown_name_is_refused_with_all_that_are_allowed(name: str) -> None:
    with pytest.raises(InvalidTarget) as caught:
        Target.parse(name)
    for known in (repr(name), "auto", "cpu", "cuda:N", *NAMED_TARGETS):
        assert known in str(caught.value)


def test_a_type_of_device_without_kernels_is_refused() -> None:
    with pytest.raises(InvalidTarget, match="'meta' is not supported; supported are cpu and cuda"):
        Target.of(torch.device("meta"))


@pytest.mark.parametrize("target", [*NAMED_TARGETS.values(), Target(**FIELDS)], ids=lambda target: target.arch)
def test_a_slug_is_a_plain_file_name(target: Target) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", target.slug)


def test_slugs_tell_devices_and_vector_extensions_apart_but_not_thread_counts() -> None:
    cpu = Target(**FIELDS)
    assert cpu.slug == "cpu-some-cpu-3-0ghz-avx512"
    assert Target(**{**FIELDS, "arch": "avx2"}).slug != cpu.slug
    assert Target(**{**FIELDS, "num_cores": 8}).slug == cpu.slug
    assert len({target.slug for target in NAMED_TARGETS.values()}) == len(NAMED_TARGETS)


def test_to_dict_gives_back_the_same_target() -> None:
    for target in (*NAMED_TARGETS.values(), Target(**FIELDS)):
        assert Target(**target.to_dict()) == target


@pytest.mark.parametrize(
    ("name", "arch"),
    [("a100", "sm_80"), ("h100", "sm_90"), ("h200", "sm_90"), ("b200", "sm_100"), ("mi300x", "gfx942")],
)
def test_a_product_can_be_named_without_being_there(name: str, arch: str) -> None:
    target = Target.parse(name)
    assert target.arch == arch
    assert target.name != arch
    assert target.num_cores == NAMED_TARGETS[arch].num_cores
    assert target.slug not in {named.slug for named in NAMED_TARGETS.values()}


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "capability", "answer"),
    [
        ("x86_64", "flags\t\t: fpu avx2 avx512f avx512_bf16 vaes", "AVX512", True),
        ("x86_64", "flags\t\t: fpu avx2 avx512f amx_bf16 amx_tile", "AVX512", True),
        ("x86_64", "flags\t\t: fpu avx2 avx512f avx512_bf16 vaes", "AVX2", False),  # PyTorch was told so
        ("x86_64", "flags\t\t: fpu avx2 avx512f avx512_vnni", "AVX512", False),
        ("x86_64", "flags\t\t: fpu avx2 vaes", "AVX2", False),
        ("aarch64", "Features\t: fp asimd sve i8mm bf16", "SVE256", True),
        ("aarch64", "Features\t: fp asimd asimddp", "DEFAULT", False),
        ("x86_64", "", "AVX512", False),
    ],
)
def test_bfloat16_is_for_cpus_that_have_units_for_it(
    machine: str, cpuinfo: str, capability: str, answer: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\nvmx flags\t: bf16\n{cpuinfo}\n\nprocessor\t: 1\n")
    monkeypatch.setattr(target_module, "CPUINFO", file)
    monkeypatch.setattr(target_module.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert cpu_multiplies_bfloat16.__wrapped__() == answer
