"""Every file that the models' side reads, damaged or forged with right checksums: a whole answer, or one error of ours.

The damage and the limits are those of `fuzz.py`, which also says what a `Format` is.
"""

import functools
import json
import struct
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz import COUNTS, Format, check_damaged, parse_lines, parse_tensors, render_lines, render_tensors
from small_models import build, small_config

from hsa_compile.files import file_sha256, json_sha256
from hsa_compile.model.config import PROTOCOLS
from hsa_compile.model.data.corpus import TokenCorpus
from hsa_compile.model.data.corpus_writer import CorpusWriter
from hsa_compile.model.data.documents import Skipped, find_sources, read_documents
from hsa_compile.model.data.journal import Settings
from hsa_compile.model.data.prepare import prepare
from hsa_compile.model.data.tokenizer import BytesTokenizer, load_tokenizer
from hsa_compile.model.evaluation.cells import retrieval_cells
from hsa_compile.model.evaluation.outcomes import OUTCOMES_FILE, OutcomeFile
from hsa_compile.model.evaluation.perplexity import Texts, perplexities, perplexity_jobs
from hsa_compile.model.evaluation.retrieval import retrieval_jobs
from hsa_compile.model.evaluation.settings import RetrievalSettings
from hsa_compile.model.evaluation.subject import Subject, run_jobs
from hsa_compile.model.inference.inference import extend, new_state, prefill
from hsa_compile.model.inference.reading import load_state, save_state
from hsa_compile.model.memory.memory import ChunkMemory
from hsa_compile.model.pretrained import from_pretrained, read_extra, read_tokenizer, save_pretrained
from hsa_compile.model.tasks.haystack import NoiseHaystack
from hsa_compile.model.training.checkpoint import RunState, load_checkpoint, read_state, save_checkpoint
from hsa_compile.model.training.config import DataConfig, RunConfig, Stage, TrainConfig
from hsa_compile.model.training.config_file import resolve
from hsa_compile.model.training.feed import lengths, plan_step
from hsa_compile.model.training.optimizer import make_optimizer
from hsa_compile.model.training.processes import Processes
from hsa_compile.model.training.run import saved_config
from hsa_compile.model.transformer import HSATransformer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")
ALONE = Processes(device=torch.device("cpu"))
TOKENS = torch.arange(40)[None] % 256


@functools.cache
def model() -> HSATransformer:
    return build(small_config("hsa-ultralong", vocab_size=256, num_groups=1, num_experts=2))


def make_model(folder: Path) -> None:
    save_pretrained(model(), folder, extra={"training": {"step": 3, "config": {"train": {"lr": 0.1}}}})


def read_model(folder: Path) -> None:
    tokenizer = load_tokenizer("bytes" if read_tokenizer(folder) == "bytes" else folder / read_tokenizer(folder))
    read_extra(folder)
    with torch.no_grad():
        from_pretrained(folder)(torch.from_numpy(tokenizer.encode("abc").astype(np.int64))[None])


def make_reading(folder: Path) -> None:
    state = new_state(model())
    prefill(model(), TOKENS, state)
    save_state(model(), state, folder)


def read_reading(folder: Path) -> None:
    for memory in ("device", "disk"):
        extend(model(), TOKENS[:, :6], load_state(model(), folder, memory=memory))


def fix_reading(folder: Path, file: Path) -> None:
    path = folder / "reading.json"
    index = json_of(path)
    if index is not None:
        if file.name == "caches.safetensors":
            index["caches_sha256"]["row0"] = file_sha256(file)
        write_sum(path, index)


def json_of(path: Path) -> dict[str, Any] | None:
    """The object in a file; None if it holds something else, which has no checksum."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def write_sum(path: Path, content: dict[str, Any]) -> None:
    """Writes an object with the right checksum, unless a mutation took the sum away."""
    if content.pop("sha256", None) is not None:
        content["sha256"] = json_sha256(content)
    try:
        path.write_text(json.dumps(content))
    except RecursionError:
        return


def make_memory(folder: Path) -> None:
    memory = ChunkMemory(batch=2, num_kv_heads=2, head_dim=4, value_dim=3, chunk_size=2, retrieval_dim=5)
    memory.append(torch.rand(2, 6, 2, 2, 4), torch.rand(2, 6, 2, 2, 3), torch.rand(2, 6, 1, 2, 5), counts=[6, 2])
    memory.save(folder)


def fix_memory(folder: Path, file: Path) -> None:
    """The sum of the manifest, after that of the shard in it."""
    path = folder / "manifest.json"
    manifest = json_of(path)
    if manifest is None:
        return
    head = {name: manifest.pop(name) for name in ("format", "version") if name in manifest}
    if file != path:
        manifest["shards"][0].update(num_bytes=file.stat().st_size, sha256=file_sha256(file))
    manifest["sha256"] = json_sha256({name: value for name, value in manifest.items() if name != "sha256"})
    path.write_text(json.dumps(head | manifest))


def read_memory(folder: Path) -> None:
    for placement in ("device", "disk"):
        memory = ChunkMemory.load(folder, placement=placement)
        shape = memory.shape
        query = torch.rand(shape.batch, 1, shape.num_kv_heads, shape.retrieval_dim, dtype=shape.landmark_dtype)
        picks, weights = memory.select(query, [n * shape.chunk_size for n in memory.num_chunks], top_k=4)
        q = torch.rand(shape.batch, 1, shape.num_kv_heads, shape.head_dim, dtype=shape.dtype)
        memory.attend(q, picks, weights)


@functools.cache
def optimizer() -> torch.optim.AdamW:
    return make_optimizer(model(), TrainConfig(steps=1))


def make_checkpoint(folder: Path) -> None:
    save_checkpoint(folder, RunState(step=3, score=0.5, data_digest="ab"), model(), optimizer(), ALONE)


def fix_checkpoint(folder: Path, file: Path) -> None:
    path = folder / "step-00000003" / "state.json"
    state = json_of(path)
    if state is not None:
        if file != path:
            state["files"][file.name] = file_sha256(file)
        write_sum(path, state)


def read_checkpoint(folder: Path) -> None:
    whole = {name: tensor.clone() for name, tensor in model().state_dict().items()}
    try:
        load_checkpoint(folder / "step-00000003", model(), optimizer(), ALONE)
        json.dumps(read_state(folder / "step-00000003").step)
    finally:
        model().load_state_dict(whole)


def corpus_source(folder: Path) -> Path:
    path = folder / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"w{number} w{number + 1} " * 9}) for number in range(12)))
    return path


def make_corpus(folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"w{number}": number for number in range(300)} | {"[UNK]": 300, "</s>": 301}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "words.json"))
    source = corpus_source(folder)
    prepare(find_sources([source]), folder / "out", tokenizer=folder / "words.json", validation=0.3)


def fix_corpus(folder: Path, file: Path) -> None:
    path = folder / "out" / "manifest.json"
    if file.suffix in (".tokens", ".ends"):
        manifest = json.loads(path.read_bytes())
        field = {".tokens": "tokens_sha256", ".ends": "ends_sha256"}[file.suffix]
        split = manifest["splits"][file.stem]
        split[field] = file_sha256(file)
        size = file.stat().st_size // {".tokens": 2, ".ends": 8}[file.suffix]
        split["tokens" if file.suffix == ".tokens" else "documents"] = size
        path.write_text(json.dumps(manifest))
    elif file.name == "tokenizer.json":
        manifest = json.loads(path.read_bytes())
        manifest["settings"]["tokenizer_digest"] = file_sha256(file)
        path.write_text(json.dumps(manifest))


def read_corpus(folder: Path) -> None:
    for split in ("train", "validation"):
        corpus = TokenCorpus(folder / "out", split=split, checksum=True)
        for row in (*corpus.documents, corpus.sample(0, min(9, len(corpus)))):
            torch.nn.functional.embedding(torch.from_numpy(row.astype(np.int64)), torch.zeros(302, 1))
        corpus.documents.lengths.tolist()
        corpus.tokenizer().decode(corpus.tokenizer().encode("w1 w2"))
    prepare(find_sources([folder / "texts.jsonl"]), folder / "out", tokenizer=folder / "words.json", validation=0.3)


def make_journal(folder: Path) -> None:
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"text {number} " * 20)
    sources = find_sources(sorted(folder.glob("*.txt")))
    settings = Settings(
        tokenizer="bytes", tokenizer_digest="bytes", validation=0.0, field="text", max_document_bytes=2**26
    )
    (folder / "out").mkdir()
    with closing(CorpusWriter(folder / "out", BytesTokenizer(), settings, sources)) as writer:
        writer.add(sources[0], lambda count: None)
        writer.add(sources[1], lambda count: None)


def read_journal(folder: Path) -> None:
    sources = find_sources(sorted(folder.glob("*.txt")))
    prepare(sources, folder / "out", validation=0.0)
    corpus = TokenCorpus(folder / "out", checksum=True)
    assert b"".join(document.tobytes() for document in corpus.documents) == b"".join(
        (f"text {number} " * 20).encode() for number in range(3)
    )


SETTINGS = RetrievalSettings(
    tasks=("s-niah",), lengths=(128,), depths=(0.0, 1.0), num_samples=2, protocols=tuple(PROTOCOLS)
)
TEXTS = Texts(
    name="text", rows=(np.arange(60, dtype=np.uint8),) * 2, are_documents=True, num_scored=8, lengths=(30, 60)
)  # fmt: skip


@functools.cache
def subject() -> Subject:
    return Subject(name="small", model=model(), tokenizer=BytesTokenizer())


def make_outcomes(folder: Path) -> None:
    read_outcomes(folder)


def read_outcomes(folder: Path) -> None:
    with OutcomeFile(folder) as outcomes:
        haystack = NoiseHaystack()
        jobs = [*retrieval_jobs(subject(), SETTINGS, haystack, outcomes), *perplexity_jobs(subject(), TEXTS, outcomes)]
        run_jobs(model(), jobs, lambda label, tokens: None)
        cells = retrieval_cells(subject(), SETTINGS, haystack, outcomes)
        assert len(cells) == 6
        found = perplexities(subject(), TEXTS, outcomes)
        assert [each.length for each in found] == [30, 60]
        json.dumps([cell.interval for cell in cells])


def run_config() -> RunConfig:
    return RunConfig(
        model=model().config,
        train=TrainConfig(steps=6),
        data=DataConfig(),
        stages=(Stage(seq_len=200, batch_tokens=400, min_distance=9), Stage(seq_len=300, batch_tokens=400, window=9)),
    )


def make_config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(run_config().to_dict()))


def use_config(run: RunConfig | None) -> None:
    assert run is not None
    plan_step(run, 0)
    for stage in run.stages:
        assert len(lengths(stage)) <= 16
        run.model_in(stage)
    json.dumps(run.to_dict(), allow_nan=False)


def make_toml(folder: Path) -> None:
    (folder / "run.toml").write_text(
        '[model]\npreset = "tiny"\ndim = 64\ntop_k = 4\nrope_theta = 5000.0\n[train]\nsteps = 9\nlr = 1e-3\n'
        'decay = "linear"\n[data]\ncorpus = ""\n[[stages]]\nseq_len = 256\nbatch_tokens = 512\nnum_needles = [1, 2]\n'
        "haystacks = {noise = 1.0}\n[[stages]]\nshare = 2.0\nseq_len = 512\nbatch_tokens = 512\nwindow = 16\n"
    )


def make_texts(folder: Path) -> None:
    corpus_source(folder)


def read_texts(folder: Path) -> None:
    for source in find_sources([folder]):
        for document in read_documents(source, max_bytes=2**20):
            assert isinstance(document, Skipped) or len(document)


def make_parquet(folder: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": [f"text {number}" for number in range(20)]}), folder / "a.parquet")


def make_arrow(folder: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table({"text": [f"text {number}" for number in range(20)]})
    with arrow.ipc.new_stream(str(folder / "a.arrow"), table.schema) as stream:
        stream.write_table(table, max_chunksize=8)


HEADER = struct.Struct("<9sQBQQ")
LISTS = {"lengths": "<i4", "begins": "<i8", "ends": "<i8"}


def make_megatron(folder: Path) -> None:
    (folder / "a.bin").write_bytes(np.arange(30, dtype="<u2").tobytes())
    lists = {"lengths": [10, 5, 15], "begins": [0, 20, 30], "ends": [0, 2, 3]}
    (folder / "a.idx").write_bytes(render_index({"magic": b"MMIDIDX\0\0", "version": 1, "code": 8} | lists))


def parse_index(data: bytes) -> Any:
    magic, version, code, num_sequences, num_ends = HEADER.unpack_from(data)
    document = {"magic": magic, "version": version, "code": code}
    place = HEADER.size
    for (name, dtype), count in zip(LISTS.items(), (num_sequences, num_sequences, num_ends), strict=True):
        document[name] = np.frombuffer(data, dtype, count, place).tolist()
        place += count * np.dtype(dtype).itemsize
    return document


def render_index(document: Any) -> bytes:
    lists = [np.array(document[name], dtype).tobytes() for name, dtype in LISTS.items()]
    counts = [len(document[name]) for name in ("lengths", "ends")]
    try:
        head = HEADER.pack(document["magic"], document["version"], document["code"], *counts)
    except struct.error as error:
        raise TypeError("another type than the header has") from error
    return head + b"".join(lists)


def render_toml(document: Any) -> bytes:
    """Writes tables in one line each."""
    return "\n".join(f"{json.dumps(name)} = {toml_value(value)}" for name, value in document.items()).encode()


def toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)} = {toml_value(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if value is None:
        raise TypeError("TOML has no null")
    return str(value) if isinstance(value, float) else json.dumps(value)


def in_folder(
    name: str,
    file: str,
    make: Callable[[Path], object],
    read: Callable[[Path], object],
    fix: Callable[[Path, Path], object] = lambda folder, path: None,
    **options: Any,
) -> Format:
    """A format whose `make`, `read` and `fix` are about the whole folder in which the first file of a pattern lies."""
    levels = file.count("/")

    def made(folder: Path) -> Path:
        make(folder)
        return min(folder.glob(file))

    return Format(
        name=name, make=made, read=lambda path: read(path.parents[levels]),
        settle=lambda path: fix(path.parents[levels], path), **options,
    )  # fmt: skip


TENSORS = {"parse": parse_tensors, "render": render_tensors}
LINES = {"parse": parse_lines, "render": render_lines}
BYTES: dict[str, Any] = {"parse": lambda data: {"data": data}, "render": lambda document: b"" + document["data"]}
TOML = {"parse": lambda data: tomllib.loads(data.decode()), "render": render_toml}
FORMATS = (
    in_folder("config of a model", "config.json", make_model, read_model),
    in_folder("weights of a model", "model.safetensors", make_model, read_model, **TENSORS),
    in_folder("index of a reading", "reading.json", make_reading, read_reading, fix_reading),
    in_folder("caches of a reading", "*/row0/caches.safetensors", make_reading, read_reading, fix_reading, **TENSORS),
    in_folder("manifest of a memory", "manifest.json", make_memory, read_memory, fix_memory),
    in_folder("shard of a memory", "chunks-*/*.safetensors", make_memory, read_memory, fix_memory, **TENSORS),
    in_folder("state of a checkpoint", "*/state.json", make_checkpoint, read_checkpoint, fix_checkpoint),
    in_folder(
        "tensors of a checkpoint", "*/*.safetensors", make_checkpoint, read_checkpoint, fix_checkpoint, **TENSORS
    ),
    in_folder("manifest of a corpus", "out/manifest.json", make_corpus, read_corpus),
    in_folder("tokens of a corpus", "out/*.tokens", make_corpus, read_corpus, fix_corpus, **BYTES),
    in_folder("ends of a corpus", "out/*.ends", make_corpus, read_corpus, fix_corpus, **BYTES),
    in_folder("tokenizer of a corpus", "out/tokenizer.json", make_corpus, read_corpus, fix_corpus),
    in_folder("journal of a corpus", "out/journal.jsonl", make_journal, read_journal, **LINES),
    in_folder("outcomes", OUTCOMES_FILE, make_outcomes, read_outcomes, **LINES),
    in_folder("config of a run", "config.json", make_config, lambda folder: use_config(saved_config(folder))),
    in_folder("recipe", "run.toml", make_toml, lambda folder: use_config(resolve(file=folder / "run.toml")), **TOML),
    in_folder("lines of text", "*.jsonl", make_texts, read_texts, **LINES),
    in_folder("columns of text", "*.parquet", make_parquet, read_texts, **BYTES),
    in_folder("saved data set", "*.arrow", make_arrow, read_texts, **BYTES),
    in_folder("index of Megatron", "*.idx", make_megatron, read_texts, parse=parse_index, render=render_index),
)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name.replace(" ", "-"))
def test_a_damaged_file_gives_a_whole_answer_or_one_line(form: Format, count: int, tmp_path: Path) -> None:
    check_damaged(form, count, tmp_path)
