"""A saved chunk memory on disk: safetensors shards in a directory of their own, and a manifest that names it.

Nothing that is there is changed: new shards are written beside the old ones and synced, and a rename of the manifest
makes them the save. A kill at any moment leaves the old save or the new one.
"""

import hashlib
import json
import mmap
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from hsa_compile.checks import check_count, check_text, one_line, shown
from hsa_compile.errors import InvalidArgument
from hsa_compile.files import file_sha256, json_sha256, open_regular, parse_json, read_regular, sync_directory
from hsa_compile.model.memory.landmarks import LandmarkStore
from hsa_compile.model.memory.pages import PagePool, mapped_tensor
from hsa_compile.model.memory.shape import PageTable

FORMAT, VERSION = "hsa-compile chunk memory", 2
MANIFEST = "manifest.json"
SHARD_BYTES = 2**27
_OURS = re.compile(r"manifest\.json(\.new)?|(\.writing|chunks)-\w+")
_MOST = 2**50  # more chunks of a row, or bytes of a shard, than a disk holds
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A file with k `[n, H, C, D]`, v `[n, H, C, Dv]` and landmarks `[n, R, H, Dr]` of successive chunks."""

    name: str
    num_chunks: int
    num_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        check_text("name of a shard", self.name)
        if not re.fullmatch(r"[\w.-]+", self.name) or self.name.startswith("."):
            raise InvalidArgument(f"name {self.name!r} is not that of a shard")
        check_count("num_chunks of a shard", self.num_chunks, 1, _MOST)
        check_count("num_bytes of a shard", self.num_bytes, 1, _MOST)
        check_text("sha256 of a shard", self.sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """What the manifest of a save says.

    Attributes:
        shape: the arguments of `ChunkMemory`, with dtypes by name.
        counts: how many chunks each row has; shards hold row after row.
        data: the directory of the shards.
        shards: the shards in order.
    """

    shape: dict[str, int | str]
    counts: list[int]
    data: str
    shards: list[Shard]

    def __post_init__(self) -> None:
        if not isinstance(self.shape, dict) or not isinstance(self.counts, list):
            raise InvalidArgument(f"shape is a {type(self.shape).__name__}, counts a {type(self.counts).__name__}")
        for count in self.counts:
            check_count("count of chunks", count, 0, _MOST)
        check_text("data", self.data)


def write_save(
    directory: Path, shape: dict[str, int | str], counts: list[int], shards: Iterable[dict[str, Tensor]]
) -> None:
    """Makes `directory` the save of these shards, which are written one at a time.

    Raises:
        InvalidArgument: something else lies in the directory.
        OSError: the disk is full or cannot be written; the save that was there is untouched.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _refuse_foreign(directory)
    made = directory / f".writing-{secrets.token_hex(8)}"
    made.mkdir()
    final = made.with_name(made.name.replace(".writing-", "chunks-"))
    try:
        written = [_write_shard(made / f"{i:05d}.safetensors", shard) for i, shard in enumerate(shards)]
        sync_directory(made)
        made.rename(final)
        sync_directory(directory)
        content = asdict(Saved(shape=shape, counts=counts, data=final.name, shards=written))
        manifest = {"format": FORMAT, "version": VERSION, "sha256": json_sha256(content), **content}
        new = directory / f"{MANIFEST}.new"
        _write(new, json.dumps(manifest, indent=1).encode())
    except BaseException:  # also an interrupt: what was begun is of no use
        shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        raise
    new.replace(directory / MANIFEST)
    sync_directory(directory)
    for old in directory.iterdir():  # they are the save before and what killed savers left
        if old.is_dir() and _OURS.fullmatch(old.name) and old != final:
            shutil.rmtree(old, ignore_errors=True)


def read_manifest(directory: Path, *, verify: bool) -> Saved:
    """Reads what the manifest says, after a look at the shards.

    Args:
        directory: the directory of the save.
        verify: whether to read all shards and compare their checksums; sizes are compared in any case.

    Raises:
        InvalidArgument: there is no save, it is of another version, or a file is damaged; the message names the file.
    """
    path = directory / MANIFEST
    try:
        manifest = parse_json(read_regular(path))
    except FileNotFoundError:
        raise InvalidArgument(f"{directory} holds no saved memory: {path} is missing") from None
    except (ValueError, OSError) as error:
        raise InvalidArgument(f"{path} cannot be read as a manifest ({one_line(error)})") from error
    if not isinstance(manifest, dict) or manifest.pop("format", None) != FORMAT:
        raise InvalidArgument(f"{path} is not the manifest of a {FORMAT}")
    if (version := manifest.pop("version", None)) != VERSION:
        raise InvalidArgument(f"{path} is of version {shown(version)}; version {VERSION} can be read")
    if manifest.pop("sha256", None) != json_sha256(manifest):
        raise InvalidArgument(f"{path} is damaged: its checksum does not match")
    try:
        saved = Saved(**{**manifest, "shards": [Shard(**shard) for shard in manifest["shards"]]})
        whole = sum(shard.num_chunks for shard in saved.shards) == sum(saved.counts)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArgument(f"{path} is not a manifest of version {VERSION} ({one_line(error)})") from error
    if not whole or not _OURS.fullmatch(saved.data):
        raise InvalidArgument(f"{path} contradicts itself: {saved.data!r} with chunks {shown(saved.counts)}")
    for shard in saved.shards:
        _check_shard(directory / saved.data / shard.name, shard, verify)
    return saved


def map_shard(path: Path, expected: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> tuple[dict[str, Tensor], Any]:
    """Maps a shard; returns its tensors, which lie in the mapped file and are never written to, and the mapping.

    Raises:
        InvalidArgument: the file is not a shard of these shapes.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        start = 8 + int.from_bytes(mapping[:8], "little")
        if start > len(mapping):
            raise ValueError(f"its header has {start - 8} bytes, the file {len(mapping)}")
        header = parse_json(mapping[8:start])
        tensors = {}
        for name, (shape, dtype) in expected.items():
            entry = header[name]
            if tuple(entry["shape"]) != shape or _DTYPES.get(entry["dtype"]) != dtype:
                found = f"{shown(entry['dtype'])} {shown(entry['shape'])}"
                raise ValueError(f"{name} is {found}, not {dtype} {list(shape)}")
            tensors[name] = mapped_tensor(mapping, start + entry["data_offsets"][0], shape, dtype)
    except (OSError, ValueError, LookupError, TypeError, OverflowError) as error:
        raise InvalidArgument(f"{path} is not a shard of this memory ({one_line(error)})") from error
    return tensors, mapping


def _refuse_foreign(directory: Path) -> None:
    for path in directory.iterdir():
        if not _OURS.fullmatch(path.name):
            raise InvalidArgument(f"{directory} holds {path.name!r}; a directory is needed that is empty or a save")
    if (directory / MANIFEST).exists():
        try:
            manifest = parse_json(read_regular(directory / MANIFEST))
        except (OSError, ValueError) as error:
            raise InvalidArgument(f"{directory / MANIFEST} is not a manifest; it is not overwritten") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise InvalidArgument(f"{directory / MANIFEST} is not the manifest of a {FORMAT}; it is not overwritten")


def _check_shard(path: Path, shard: Shard, verify: bool) -> None:
    try:
        size = path.stat().st_size
        if size != shard.num_bytes:
            raise InvalidArgument(f"{path} has {size} bytes, not the {shard.num_bytes} that were written")
        damaged = verify and file_sha256(path) != shard.sha256
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read ({error.strerror})") from error
    if damaged:
        raise InvalidArgument(f"{path} is damaged: its checksum does not match")


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> Shard:
    data = safetensors.torch.save({name: x.cpu().contiguous() for name, x in tensors.items()})
    _write(path, data)
    return Shard(
        name=path.name,
        num_chunks=len(tensors["landmarks"]),
        num_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def shards_of(pages: PagePool, table: PageTable, landmarks: LandmarkStore) -> Iterator[dict[str, Tensor]]:
    """Yields the chunks of all rows, row after row, as many at a time as a shard takes."""
    numbers = torch.cat([table.pages(row, 0, count) for row, count in enumerate(table.counts)])
    size = max(1, SHARD_BYTES // pages.shape.page_bytes)
    for first in range(0, len(numbers), size):
        last = min(first + size, len(numbers))
        k, v = _pages(pages, numbers[first:last])
        parts = [landmarks.read(*part) for part in _rows(table.counts, first, last)]
        yield {"k": k, "v": v, "landmarks": torch.cat(parts)}


def restore(pages: PagePool, table: PageTable, landmarks: LandmarkStore, directory: Path, saved: Saved) -> None:
    """Fills an empty memory from a save. On `disk` keys and values stay in the shards, which are mapped.

    Raises:
        InvalidArgument: a shard is not what the manifest says.
    """
    shape, first = pages.shape, 0
    for shard in saved.shards:
        n = shard.num_chunks
        expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "k": (shape.keys(n), shape.dtype),
            "v": (shape.values(n), shape.dtype),
            "landmarks": (shape.landmarks(n), shape.landmark_dtype),
        }
        tensors, mapping = map_shard(directory / saved.data / shard.name, expected)
        k, v, near = (tensors[name] for name in ("k", "v", "landmarks"))
        if pages.placement == "disk":
            pages.attach(k, v, mapping)
        else:
            pages.append(k, v)
        begin = first
        for row, chunk, end in _rows(saved.counts, first, first + n):
            landmarks.write(row, chunk, near[begin - first : begin - first + end - chunk])
            begin += end - chunk
        first += n
    first = 0
    for row, count in enumerate(saved.counts):
        table.append(row, first, count)
        first += count


def _pages(pages: PagePool, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Returns keys `[n, H, C, D]` and values of pages in any order, on the CPU."""
    heads = pages.shape.num_kv_heads
    rising, order = numbers.sort()
    slots = (rising.view(-1, 1) * heads + torch.arange(heads)).flatten()
    k, v = (x.unflatten(0, (-1, heads)) for x in pages.read(slots, len(slots), device=torch.device("cpu")))
    if torch.equal(rising, numbers):
        return k, v
    back = order.argsort()
    return k[back], v[back]


def _rows(counts: list[int], first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """Yields chunks `first … last − 1` of all rows laid end to end, as (row, its first chunk, the end)."""
    start = 0
    for row, count in enumerate(counts):
        begin, end = max(first - start, 0), min(last - start, count)
        if begin < end:
            yield row, begin, end
        start += count
