import pytest

from hsa_compile.errors import InvalidTarget
from hsa_compile.model.cost.scale import Cluster
from hsa_compile.peaks import LIMITS
from hsa_compile.target import PRODUCTS


@pytest.mark.parametrize(
    ("text", "count", "arch", "nodes"),
    [
        ("64xH100", 64, "sm_90", 8),
        ("h200", 1, "sm_90", 1),
        ("4xmi300x", 4, "gfx942", 1),
        ("16xsm_100", 16, "sm_100", 2),
    ],
)
def test_a_count_and_a_name(text: str, count: int, arch: str, nodes: int) -> None:
    cluster = Cluster.parse(text)
    assert (cluster.count, cluster.target.arch, cluster.count // cluster.node_devices) == (count, arch, nodes)


def test_products_of_one_architecture_have_memories_of_their_own() -> None:
    assert Cluster.parse("h100").limits.memory_gb == 80
    assert Cluster.parse("h200").limits.memory_gb == 141
    assert Cluster.parse("h100").limits == LIMITS["sm_90"]


@pytest.mark.parametrize("text", ["64xrtx", "h100x64", "xh100", "", "8 h100", "1.5xh100"])
def test_unknown_devices_are_named_with_those_that_are_known(text: str) -> None:
    with pytest.raises(InvalidTarget, match="are not known; allowed is a count and a name") as refused:
        Cluster.parse(text)
    assert repr(text) in str(refused.value)
    assert all(name in str(refused.value) for name in PRODUCTS)


@pytest.mark.parametrize("text", ["0xh100", "12xh100", "8000000xh100"])
def test_counts_that_no_nodes_have_are_refused(text: str) -> None:
    with pytest.raises(InvalidTarget, match=f"count = {text.partition('x')[0]} must be"):
        Cluster.parse(text)
