"""What a corpus of many shards and gigabytes asks of a process that trains on it: seconds to open it, memory, rows.

python benchmarks/large_corpus.py FOLDER [GIGABYTES]

The corpus is synthetic, 20 shards of bytes in documents of 1,000 on average. It is written into FOLDER, which must be
new, read by processes of their own, and removed. Two ranks of a run on shuffled documents make batches from a step in
the middle of an epoch; the first is then started anew at a later step, and must give the same rows.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from hsa_compile.files import file_sha256
from hsa_compile.model.data.documents import MAX_DOCUMENT_BYTES
from hsa_compile.model.data.journal import Settings
from hsa_compile.model.data.manifest import SPLITS, Manifest, SplitSummary, ends_name, tokens_name, write_manifest
from hsa_compile.model.data.tokenizer import BYTES
from hsa_compile.model.presets import preset
from hsa_compile.model.training.config import DOCUMENTS, DataConfig, RunConfig, Stage, TrainConfig
from hsa_compile.model.training.feed import Feed, mixtures, open_corpus, tokens_before

SHARDS, MEAN_DOCUMENT, BLOCK = 20, 1000, 2**26
ROW, ROWS = 8191, 16  # no multiple of anything
FIRST_STEP, LATER, STEPS = 12_345, 12_353, 16


def write_shard(folder: Path, size: int, seed: int) -> int:
    """Writes a prepared folder of so many bytes; returns how many documents it has."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    lengths = generator.geometric(1 / MEAN_DOCUMENT, size=2 * size // MEAN_DOCUMENT) + 1
    ends = lengths.cumsum()
    ends = ends[: np.searchsorted(ends, size)]
    text = generator.integers(1, 256, size=BLOCK, dtype=np.uint8)
    with (folder / tokens_name("train")).open("wb") as file:
        for start in range(0, int(ends[-1]), BLOCK):
            block = np.roll(text, start // BLOCK)[: min(BLOCK, int(ends[-1]) - start)]
            inside = ends[np.searchsorted(ends, start, "right") : np.searchsorted(ends, start + len(block), "right")]
            block[inside - 1 - start] = 0
            file.write(block.tobytes())
    ends.astype("<i8").tofile(folder / ends_name("train"))
    for name in (tokens_name("validation"), ends_name("validation")):
        (folder / name).touch()
    splits = {
        split: SplitSummary(documents=count, tokens=tokens, tokens_sha256=file_sha256(folder / tokens_name(split)),
                            ends_sha256=file_sha256(folder / ends_name(split)))
        for split, count, tokens in zip(SPLITS, (len(ends), 0), (int(ends[-1]), 0), strict=True)
    }  # fmt: skip
    settings = Settings(
        tokenizer=BYTES, tokenizer_digest=BYTES, validation=0.0, field="text", max_document_bytes=MAX_DOCUMENT_BYTES
    )
    write_manifest(folder, Manifest(settings=settings, vocab_size=256, separator=0, dtype="uint8", splits=splits,
                                    duplicates=0, skipped={}, sources=[]))  # fmt: skip
    return len(ends)


def config(folder: Path) -> RunConfig:
    """A run of plain rows of shuffled documents."""
    return RunConfig(
        model=preset("small"),
        train=TrainConfig(steps=100_000),
        data=DataConfig(corpus=str(folder), order=DOCUMENTS),
        stages=(Stage(seq_len=ROW, batch_tokens=ROW * ROWS, synthetic_share=0.0),),
    )


def memory(name: str) -> int:
    """Bytes of this process: `VmRSS` are resident now, `VmHWM` were at most."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def read(folder: Path, first_step: int, rank: int) -> None:
    """Prints what a process of two measures, and a digest of each of its batches."""
    run, before, began = config(folder), memory("VmRSS"), time.perf_counter()
    corpus = open_corpus(run)
    assert corpus is not None
    opened = time.perf_counter()
    feed = Feed(run, mixtures(run, corpus), first_step=first_step, rank=rank, world_size=2)
    batches = [feed.next()]
    first = time.perf_counter()
    batches += [feed.next() for _ in range(STEPS - 1)]
    done = time.perf_counter()
    feed.close()
    found = {
        "open_s": opened - began,
        "first_batch_s": first - opened,
        "tokens_a_s": sum(batch.tokens.numel() for batch in batches[1:]) / (done - first),
        "memory_mb": (memory("VmRSS") - before) / 1e6,
        "peak_mb": (memory("VmHWM") - before) / 1e6,
        "place": tokens_before(run, first_step),
        "rows": [hashlib.sha256(row.numpy().tobytes()).hexdigest() for batch in batches for row in batch.tokens],
    }
    print(json.dumps(found))


def in_process(folder: Path, first_step: int, rank: int) -> dict[str, object]:
    """What a process of its own finds."""
    command = [sys.executable, __file__, str(folder), "read", str(first_step), str(rank)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    """Writes, reads three times, compares, removes."""
    folder = Path(sys.argv[1])
    size = int(float(sys.argv[2] if len(sys.argv) > 2 else 10) * 1e9) // SHARDS
    folder.mkdir(parents=True)
    try:
        documents = sum(write_shard(folder / f"shard-{number:02}", size, number) for number in range(SHARDS))
        print(f"{SHARDS} shards, {SHARDS * size / 1e9:g} GB, {documents:,} documents", flush=True)
        one, other, later = (in_process(folder, step, rank) for step, rank in
                             ((FIRST_STEP, 0), (FIRST_STEP, 1), (LATER, 0)))  # fmt: skip
    finally:
        shutil.rmtree(folder)
    for name, found in (("rank 0", one), ("rank 1", other), ("rank 0, begun later", later)):
        shown = ", ".join(f"{key} {value:,.4g}" for key, value in found.items() if key not in ("rows", "place"))
        print(f"{name}, from token {found['place']:,}: {shown}")
    skipped = (LATER - FIRST_STEP) * ROWS // 2
    assert later["rows"][:skipped] == one["rows"][skipped:], "begun later, a process gives other rows"
    assert not set(one["rows"]) & set(other["rows"]), "two ranks have a row in common"
    print("begun later: the same rows; two ranks: no row in common")


if __name__ == "__main__":
    if sys.argv[2:3] == ["read"]:
        read(Path(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
