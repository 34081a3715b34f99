"""Every file that the models' side reads, damaged or forged with right checksums: a whole answer, or one error of ours."""

import functools
import hashlib
import json
import random
import shutil
import traceback
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzzing
import numpy as np
import pytest
import torch
from fuzzing import Mutation
from small_models import build, small_config

from hsa_compile.errors import HSACompileError, HSACompileWarning
from hsa_compile.model.config import PROTOCOLS
from hsa_compile.model.data.corpus import TokenCorpus
from hsa_compile.model.data.corpus_writer import CorpusWriter
from hsa_compile.model.data.documents import find_sources, read_documents
from hsa_compile.model.data.journal import Settings
from hsa_compile.model.data.prepare import prepare
from hsa_compile.model.data.tokenizer import BytesTokenizer, load_tokenizer
from hsa_compile.model.evaluation.outcomes import OUTCOMES_FILE, OutcomeFile
from hsa_compile.model.evaluation.perplexity import Texts, perplexities, perplexity_jobs
from hsa_compile.model.evaluation.results import retrieval_cells
from hsa_compile.model.evaluation.retrieval import retrieval_jobs
from hsa_compile.model.evaluation.settings import RetrievalSettings
from hsa_compile.model.evaluation.subject import Subject, run_jobs
from hsa_compile.model.inference.inference import extend, new_state, prefill
from hsa_compile.model.inference.reading import load_state, save_state
from hsa_compile.files import file_sha256, json_sha256
from hsa_compile.model.memory.memory import ChunkMemory
from hsa_compile.model.pretrained import from_pretrained, read_extra, read_tokenizer, save_pretrained
from hsa_compile.model.tasks.haystack import NoiseHaystack
from hsa_compile.model.training.checkpoint import RunState, load_checkpoint, read_state, save_checkpoint
from hsa_compile.model.training.config import RunConfig, Stage, TrainConfig, DataConfig
from hsa_compile.model.training.config_file import resolve
from hsa_compile.model.training.feed import lengths, plan_step
from hsa_compile.model.training.processes import Processes
from hsa_compile.model.training.run import saved_config
from hsa_compile.model.training.step import make_optimizer
from hsa_compile.model.transformer import HSATransformer

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.HSACompileWarning")

SAMPLE, ALL = 60, 2000
ALONE = Processes(device=torch.device("cpu"))
TOKENS = torch.arange(40)[None] % 256


@dataclass(frozen=True, kw_only=True)
class Format:
    """A kind of file.

    Attributes:
        name: what it is.
        files: the files that are mutated, as a pattern in the folder; one of them at a time.
        make: writes whole files into a folder.
        mutate: changes the bytes of one.
        fix: makes checksums right again, given the folder and the file.
        read: reads all of the folder, and uses what it read.
    """

    name: str
    files: str
    make: Callable[[Path], None]
    mutate: Mutation
    fix: Callable[[Path, Path], None]
    read: Callable[[Path], object]


@functools.cache
def model() -> HSATransformer:
    return build(small_config("hsa-ultralong", vocab_size=256, num_groups=1, num_experts=2))


def nothing(folder: Path, file: Path) -> None:
    """There is no checksum."""


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
    memory.append(torch.rand(2, 6, 2, 2, 4), torch.rand(2, 6, 2, 2, 3), torch.rand(2, 6, 2, 5), counts=[6, 2])
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
        split[field] = hashlib.sha256(file.read_bytes()).hexdigest()
        size = file.stat().st_size // {".tokens": 2, ".ends": 8}[file.suffix]
        split["tokens" if file.suffix == ".tokens" else "documents"] = size
        path.write_text(json.dumps(manifest))
    elif file.name == "tokenizer.json":
        manifest = json.loads(path.read_bytes())
        manifest["settings"]["tokenizer_digest"] = hashlib.sha256(file.read_bytes()).hexdigest()
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
            str(document)


def make_parquet(folder: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": [f"text {number}" for number in range(20)]}), folder / "a.parquet")


FORMATS = [
    Format(name="model config", files="config.json", make=make_model, mutate=fuzzing.mutated_json, fix=nothing,
           read=read_model),
    Format(name="model weights", files="model.safetensors", make=make_model, mutate=fuzzing.mutated_tensors, fix=nothing,
           read=read_model),
    Format(name="reading index", files="reading.json", make=make_reading, mutate=fuzzing.mutated_json,
           fix=fix_reading, read=read_reading),
    Format(name="reading caches", files="**/caches.safetensors", make=make_reading, mutate=fuzzing.mutated_tensors,
           fix=fix_reading, read=read_reading),
    Format(name="memory manifest", files="manifest.json", make=make_memory, mutate=fuzzing.mutated_json, fix=fix_memory,
           read=read_memory),
    Format(name="memory shard", files="**/*.safetensors", make=make_memory, mutate=fuzzing.mutated_tensors,
           fix=fix_memory, read=read_memory),
    Format(name="checkpoint state", files="**/state.json", make=make_checkpoint, mutate=fuzzing.mutated_json,
           fix=fix_checkpoint, read=read_checkpoint),
    Format(name="checkpoint tensors", files="**/*.safetensors", make=make_checkpoint, mutate=fuzzing.mutated_tensors,
           fix=fix_checkpoint, read=read_checkpoint),
    Format(name="corpus manifest", files="out/manifest.json", make=make_corpus, mutate=fuzzing.mutated_json, fix=nothing,
           read=read_corpus),
    Format(name="corpus tokens", files="out/*.tokens", make=make_corpus, mutate=fuzzing.mutated_bytes, fix=fix_corpus,
           read=read_corpus),
    Format(name="corpus ends", files="out/*.ends", make=make_corpus, mutate=fuzzing.mutated_bytes, fix=fix_corpus,
           read=read_corpus),
    Format(name="tokenizer", files="out/tokenizer.json", make=make_corpus, mutate=fuzzing.mutated_json, fix=fix_corpus,
           read=read_corpus),
    Format(name="corpus journal", files="out/journal.jsonl", make=make_journal, mutate=fuzzing.mutated_lines,
           fix=nothing, read=read_journal),
    Format(name="outcomes", files=OUTCOMES_FILE, make=make_outcomes, mutate=fuzzing.mutated_lines, fix=nothing,
           read=read_outcomes),
    Format(name="run config", files="config.json", make=make_config, mutate=fuzzing.mutated_json, fix=nothing,
           read=lambda folder: use_config(saved_config(folder))),
    Format(name="recipe", files="run.toml", make=make_toml, mutate=fuzzing.mutated_toml, fix=nothing,
           read=lambda folder: use_config(resolve(file=folder / "run.toml"))),
    Format(name="texts", files="*.jsonl", make=make_texts, mutate=fuzzing.mutated_lines, fix=nothing, read=read_texts),
    Format(name="parquet", files="*.parquet", make=make_parquet, mutate=fuzzing.mutated_bytes, fix=nothing,
           read=read_texts),
]  # fmt: skip


@pytest.mark.parametrize("count", [SAMPLE, pytest.param(ALL, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_a_damaged_or_forged_file_is_a_whole_answer_or_one_error(form: Format, count: int, tmp_path: Path) -> None:
    seed, folder = made(form, tmp_path)
    failures = [failure for number in range(count) if (failure := failure_of(form, number, seed, folder))]
    assert not failures, f"{len(failures)} of {count}:\n" + "\n".join(failures[:5])


def made(form: Format, directory: Path) -> tuple[Path, Path]:
    """Makes whole files and reads them; returns where they are kept, and the folder where they are read."""
    seed, folder = directory / "seed", directory / "folder"
    folder.mkdir()
    form.make(folder)
    shutil.copytree(folder, seed)
    form.read(folder)
    return seed, folder


def copied(seed: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(seed, folder)
    return folder


def failure_of(form: Format, number: int, seed: Path, folder: Path) -> str:
    """What a mutation raised that is no error of ours; empty if all is well."""
    draw = random.Random(f"{form.name} {number}")
    file = draw.choice(sorted(copied(seed, folder).glob(form.files)))
    file.write_bytes(form.mutate(file.read_bytes(), draw))
    form.fix(folder, file)
    try:
        with fuzzing.limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore", HSACompileWarning)
            form.read(folder)
    except HSACompileError as error:
        return "" if str(error).strip() and len(str(error)) < 10_000 else f"{number}: {error!r:.200}"
    except BaseException as error:  # noqa: BLE001 whatever it is, it is a fault; Rust's panics derive from it
        return f"{number}: {error!r:.300}\n{''.join(traceback.format_tb(error.__traceback__)[-3:])}"
    return ""
