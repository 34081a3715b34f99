"""Saves of the chunk memory: what is read back, what a kill leaves, what is refused."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch import Tensor

from hsa_compile.errors import InvalidArgument
from hsa_compile.files import json_sha256
from hsa_compile.model.memory import files as memory_shards
from hsa_compile.model.memory import pages as memory_pages
from hsa_compile.model.memory.memory import ChunkMemory

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")

SHAPE = {
    "batch": 3, "num_kv_heads": 2, "head_dim": 8, "value_dim": 5, "chunk_size": 3, "retrieval_dim": 6,
    "landmarks_per_chunk": 4,
}  # fmt: skip
COUNTS = [9, 0, 14]
PLACEMENTS = ("device", "host", "disk")


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards, one of which ends in the middle of a row, and several segments."""
    monkeypatch.setattr(memory_shards, "SHARD_BYTES", 5 * 2 * 3 * 13 * 4)
    monkeypatch.setattr(memory_pages, "FIRST_SEGMENT_PAGES", 4)


def chunks(n: int, seed: int = 0, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    k, v = torch.randn(batch, n, 3, 2, 8, generator=random), torch.randn(batch, n, 3, 2, 5, generator=random)
    return k, v, torch.randn(batch, n, 4, 2, 6, generator=random)


def book(dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> ChunkMemory:
    """A memory whose rows grew in turns, so that their pages lie mixed."""
    memory = ChunkMemory(**SHAPE, dtype=dtype, **options)
    memory.append(*chunks(6, seed), counts=[6, 0, 2])
    memory.append(*chunks(12, seed + 1), counts=[3, 0, 12])
    return memory


def answers(memory: ChunkMemory) -> tuple[Tensor, ...]:
    """What the memory tells: every chunk is read."""
    random = torch.Generator().manual_seed(5)
    query = torch.randn(3, 2, 2, 6, generator=random)
    q = torch.randn(3, 2, 4, 8, generator=random).to(memory.shape.dtype)
    indices, weights = memory.select(query, [n * 3 for n in memory.num_chunks], top_k=30)
    return indices, weights, memory.attend(q, indices, weights)


def assert_same(one: ChunkMemory, other: ChunkMemory) -> None:
    assert one.num_chunks == other.num_chunks
    for x, y in zip(answers(one), answers(other), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_save_is_read_back_bit_for_bit(tmp_path: Path, placement: str, dtype: torch.dtype) -> None:
    memory = book(dtype, landmark_dtype=torch.float32)
    memory.save(tmp_path / "save")
    for verify in (True, False):
        loaded = ChunkMemory.load(tmp_path / "save", placement=placement, verify=verify)
        assert loaded.shape == memory.shape
        assert_same(loaded, memory)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_memory_in_any_place_can_be_saved(tmp_path: Path, placement: str) -> None:
    book(placement=placement, directory=tmp_path / "scratch").save(tmp_path / "save")
    assert_same(ChunkMemory.load(tmp_path / "save"), book())


def test_others_may_read_a_save_as_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        book().save(tmp_path / "save")
    finally:
        os.umask(before)
    modes = {path.is_dir(): path.stat().st_mode & 0o777 for path in (tmp_path / "save").rglob("*")}
    assert modes == {True: 0o750, False: 0o640}


def test_an_empty_memory_can_be_saved(tmp_path: Path) -> None:
    ChunkMemory(**SHAPE).save(tmp_path)
    loaded = ChunkMemory.load(tmp_path, placement="disk")
    assert loaded.num_chunks == [0, 0, 0]
    loaded.append(*chunks(3))
    assert loaded.num_chunks == [3, 3, 3]


def test_shards_are_safetensors(tmp_path: Path) -> None:
    book().save(tmp_path)
    shards = sorted(tmp_path.glob("chunks-*/*.safetensors"))
    assert len(shards) == 5
    keys = []
    for shard in shards:
        with safetensors.safe_open(shard, framework="pt") as file:
            assert set(file.keys()) == {"k", "v", "landmarks"}
            keys.append(file.get_tensor("k"))
    assert torch.cat(keys).shape == (sum(COUNTS), 2, 3, 8)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_loaded_memory_grows_and_is_edited_while_its_save_stays(tmp_path: Path, placement: str) -> None:
    expected = book()
    expected.save(tmp_path)
    loaded = ChunkMemory.load(tmp_path, placement=placement)
    for memory in (expected, loaded):
        memory.append(*chunks(5, seed=7))
        memory.overwrite(2, 10, *(x[0] for x in chunks(6, seed=8, batch=1)))
        memory.overwrite(2, 11, *(x[0] for x in chunks(2, seed=9, batch=1)))
    assert_same(loaded, expected)
    assert_same(ChunkMemory.load(tmp_path), book())
    loaded.save(tmp_path)  # over the files that it maps
    assert_same(loaded, expected)
    assert_same(ChunkMemory.load(tmp_path, placement=placement), expected)


def test_a_save_on_disk_is_mapped_and_not_read(tmp_path: Path) -> None:
    book().save(tmp_path)
    loaded = ChunkMemory.load(tmp_path, placement="disk")
    assert dict(loaded.nbytes)["disk"] == sum(COUNTS) * loaded.shape.page_bytes
    assert all(segment.mapping is not None for segment in loaded.pages._segments)


def test_an_old_save_is_cleared_away(tmp_path: Path) -> None:
    book().save(tmp_path)
    (tmp_path / ".writing-killed").mkdir()
    book(seed=3).save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert_same(ChunkMemory.load(tmp_path), book(seed=3))


# Every call that changes the disk, counted: the process is killed before the n-th.
_KILLED_SAVE = """
import os, signal, sys, pathlib
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from tests_of_files import book, memory_shards
memory_shards.SHARD_BYTES = 5 * 2 * 3 * 13 * 4
memory = book(seed=3)

def killing(module, name, moments):
    original = getattr(module, name)
    def call(*args, **options):
        moments[0] -= 1
        if moments[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)
    setattr(module, name, call)

moment = 0
while True:
    moment += 1
    target = pathlib.Path(sys.argv[1]) / str(moment)
    book().save(target)
    child = os.fork()
    if child == 0:
        moments = [moment]
        for module, name in ((os, "fsync"), (os, "mkdir"), (pathlib.Path, "rename"), (pathlib.Path, "replace"),
                             (pathlib.Path, "open"), (os, "rmdir"), (os, "unlink")):
            killing(module, name, moments)
        memory.save(target)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        print(moment)
        break
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_old_save_or_the_new(tmp_path: Path) -> None:
    (tmp_path / "tests_of_files.py").write_text(Path(__file__).read_text())
    saves = tmp_path / "saves"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _KILLED_SAVE, str(saves), str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    moments = int(done.stdout)
    assert moments > 20
    old, new = book(), book(seed=3)
    kept = []
    for moment in range(1, moments + 1):
        loaded = ChunkMemory.load(saves / str(moment))
        kept.append(torch.equal(answers(loaded)[2], answers(old)[2]))
        assert_same(loaded, old if kept[-1] else new)
        book(seed=3).save(saves / str(moment))  # what the kill left is no hindrance, and is cleared away
        assert len(list((saves / str(moment)).iterdir())) == 2
        assert_same(ChunkMemory.load(saves / str(moment)), new)
    assert kept[0]
    assert not kept[-1]
    assert kept == sorted(kept, reverse=True)


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, keep: float, verify: bool) -> None:
    book().save(tmp_path)
    for path in _files(tmp_path):
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep)])
        with pytest.raises(InvalidArgument, match=path.name):
            ChunkMemory.load(tmp_path, verify=verify)
        path.write_bytes(data)
    assert_same(ChunkMemory.load(tmp_path), book())


def test_a_flipped_bit_is_refused_by_name(tmp_path: Path) -> None:
    book().save(tmp_path)
    for path in _files(tmp_path):
        data = path.read_bytes()
        for at in range(0, len(data), max(1, len(data) // 23)):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            with pytest.raises(InvalidArgument, match=path.name):
                ChunkMemory.load(tmp_path, placement="disk")
        path.write_bytes(data)
    assert_same(ChunkMemory.load(tmp_path), book())


def test_a_missing_shard_is_refused_by_name(tmp_path: Path) -> None:
    book().save(tmp_path)
    shard = sorted(tmp_path.glob("chunks-*/*"))[2]
    shard.unlink()
    with pytest.raises(InvalidArgument, match=f"{shard.name} cannot be read"):
        ChunkMemory.load(tmp_path)


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A manifest that says something else, and whose checksum is right."""

    def edit(directory: Path) -> None:
        path = directory / "manifest.json"
        content = json.loads(path.read_text())
        head = {name: content.pop(name) for name in ("format", "version", "sha256")}
        change(content)
        path.write_text(json.dumps({**head, "sha256": json_sha256(content), **content}))

    return edit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(counts=[9, 0, 13]), "contradicts itself"),
        (lambda c: c.update(counts=[23]), "1 counts for a batch of 3"),
        (lambda c: c.update(counts=["a"]), "not a manifest of version 2"),
        (lambda c: c.update(data="../elsewhere"), "contradicts itself"),
        (lambda c: c["shards"][0].update(name="../../x"), "not a manifest of version 2"),
        (lambda c: c["shards"][0].update(num_bytes="many"), "not a manifest of version 2"),
        (lambda c: c["shape"].update(head_dim=9), "00000.safetensors is not a shard of this memory"),
        (lambda c: c["shape"].update(dtype="int8"), "dtype = 'int8' is not one of"),
        (lambda c: c["shape"].pop("batch"), "missing 1 required keyword"),
        (lambda c: c.pop("shape"), "not a manifest of version 2"),
    ],
)
def test_a_manifest_that_is_wrong_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    book().save(tmp_path)
    _edit(change)(tmp_path)
    with pytest.raises(InvalidArgument, match=message):
        ChunkMemory.load(tmp_path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    book().save(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"version": 2', '"version": 1'))
    with pytest.raises(InvalidArgument, match=r"manifest\.json is of version 1; version 2 can be read"):
        ChunkMemory.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"format": "another"}', "\x00\xff"])
def test_what_is_no_save_is_neither_read_nor_written_over(tmp_path: Path, content: str) -> None:
    with pytest.raises(InvalidArgument, match="holds no saved memory"):
        ChunkMemory.load(tmp_path / "nowhere")
    (tmp_path / "manifest.json").write_text(content)
    for call in (ChunkMemory.load, book().save):
        with pytest.raises(InvalidArgument, match=r"manifest\.json"):
            call(tmp_path)
    assert (tmp_path / "manifest.json").read_text() == content


def test_a_directory_of_other_things_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InvalidArgument, match=r"holds 'thesis\.tex'; a directory is needed that is empty or a save"):
        book().save(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]  # noqa: PTH208


def test_a_full_disk_leaves_the_old_save(tmp_path: Path) -> None:
    book().save(tmp_path)
    before = _files(tmp_path)
    larger = book(seed=3)
    larger.append(*chunks(40))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            larger.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert _files(tmp_path) == before
    assert_same(ChunkMemory.load(tmp_path), book())
