"""What a person decides about a training run: optimization, data, and the stages that follow each other."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hsa_compile.checks import check_choice, check_count, check_number, pair, shown
from hsa_compile.errors import InvalidArgument
from hsa_compile.model.config import AUTO, CHUNK_EXCHANGES, ModelConfig
from hsa_compile.model.tasks.family import TASKS
from hsa_compile.model.tasks.haystack import NEEDLES, NOISE
from hsa_compile.model.tasks.mixture import SHARES

DECAYS = ("constant", "linear", "cosine")
PRECISIONS = ("auto", "float32", "bfloat16")
CORPUS_HAYSTACK, ASSIGNMENT_HAYSTACK = "corpus", "assignments"
MADE_HAYSTACKS = (NOISE, NEEDLES)
HAYSTACKS = (*MADE_HAYSTACKS, CORPUS_HAYSTACK, ASSIGNMENT_HAYSTACK)
ADAMW, MUON = "adamw", "muon"
OPTIMIZERS = (ADAMW, MUON)
WINDOWS, DOCUMENTS = "windows", "documents"
ORDERS = (WINDOWS, DOCUMENTS)
MAX_ROWS = 2**20  # the most rows of a step


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How weights are optimized, and what is written meanwhile.

    Attributes:
        steps: how many optimizer steps the whole run makes.
        seed: the seed of weights, data and selection noise.
        optimizer: `adamw`; or `muon`, which moves the weights of linear layers by Muon, and all others by AdamW.
        lr: the learning rate of both, after warm-up and before decay.
        beta1, beta2, eps: AdamW's other settings.
        weight_decay: a step takes lr × weight_decay of each matrix away; vectors (norms, biases) do not decay.
        warmup_steps: in how many steps the learning rate rises linearly from 0.
        decay: `constant`, or `linear` or `cosine` down to `final_lr` × lr over the last part of the run.
        decay_share: how long that part is, as a share of the steps.
        final_lr: the last learning rate, as a share of `lr`.
        clip: largest norm of the gradient; 0 for no clipping.
        accumulation: into how many parts a process cuts its rows, computed one after the other; the sum is the same.
        precision: the precision of products. `auto` is bfloat16 autocast on CUDA and on CPUs with units for it (AVX-512
            BF16, AMX, BF16 of Arm), and float32 elsewhere.
        checkpoint_activations: whether activations are computed again in the backward pass instead of kept.
        compile: whether the model runs through `torch.compile`.
        context_parallel: how many processes share each row, each with a contiguous part of its tokens.
        expert_parallel: how many processes share the experts of each MoE layer; tokens travel to them and back.
        chunk_exchange: how processes that share a row read each other's chunks. `gather` brings the chunks of the whole
            row to each process, once for all layers; `travel` brings those that its tokens picked, once a retrieval,
            and needs less memory where tokens pick few of them. `auto` takes what sends less if tokens pick at random.
        loss_chunk: how many tokens have logits at a time.
        retrieval_loss: what the cross entropy of landmark scores against the chunk that an answer's byte is copied from
            counts, in the mean over answers. Only answers that are values of needles have such bytes, and only models
            whose tokens choose chunks for themselves have this loss.
        bias_update_rate: by how much MoE's balancing biases move in a step.
        sharpen_scores: what the saved model's `retrieval_scale` is multiplied by if its weights are a softmax of the
            scores; training goes on without it. A model that trains with sharper scores gets used to them. In `ramba`
            each pick breaks its share off the stick by its own score, so that all shares would change.
        log_every: how many steps lie between lines and records with router load and retrieval entropy.
        save_every: how many steps lie between checkpoints; 0 saves only at the end and when stopped.
        keep_last: how many checkpoints are kept beside the best.
        probe_every: how many steps lie between probes of retrieval and held-out loss; 0 for none.
        probe_samples: how many samples a probe has at each length.
        peak_tflops: the peak of the device in TFLOP/s, for MFU; 0 takes what is known of the device, or gives no MFU.
        wandb_project: the Weights & Biases project that gets the records too; empty for none.

    Raises:
        InvalidArgument: a value is out of range; the message names it, its value and what is allowed.
    """

    steps: int
    seed: int = 0
    optimizer: str = ADAMW
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 50
    decay: str = "constant"
    decay_share: float = 0.3
    final_lr: float = 0.05
    clip: float = 1.0
    accumulation: int = 1
    precision: str = "auto"
    checkpoint_activations: bool = False
    compile: bool = False
    context_parallel: int = 1
    expert_parallel: int = 1
    chunk_exchange: str = AUTO
    loss_chunk: int = 4096
    retrieval_loss: float = 0.0
    bias_update_rate: float = 1e-3
    sharpen_scores: float = 1.0
    log_every: int = 10
    save_every: int = 100
    keep_last: int = 2
    probe_every: int = 100
    probe_samples: int = 16
    peak_tflops: float = 0.0
    wandb_project: str = ""

    def __post_init__(self) -> None:
        for name, low, high in _COUNTS:
            check_count(f"train.{name}", getattr(self, name), low, high)
        for name, least, most in _NUMBERS:
            check_number(f"train.{name}", getattr(self, name), least, most)
        for name in ("checkpoint_activations", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidArgument(f"train.{name} = {getattr(self, name)!r} must be true or false")
        for name in ("context_parallel", "expert_parallel"):
            if self.compile and getattr(self, name) > 1:
                raise InvalidArgument(f"train.{name} = {getattr(self, name)} does not go together with train.compile")
        check_choice("train.optimizer", self.optimizer, OPTIMIZERS)
        check_choice("train.decay", self.decay, DECAYS)
        check_choice("train.precision", self.precision, PRECISIONS)
        check_choice("train.chunk_exchange", self.chunk_exchange, CHUNK_EXCHANGES)
        if not isinstance(self.wandb_project, str):
            raise InvalidArgument(f"train.wandb_project = {self.wandb_project!r} must be a string")
        if self.lr == 0:
            raise InvalidArgument("train.lr = 0 must be more than 0")

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of a step, counted from 0: linear warm-up, constant, then the last part's decay."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        decay_steps = round(self.steps * self.decay_share)
        into = step - (self.steps - decay_steps) + 1
        if self.decay == "constant" or into <= 0:
            return self.lr
        progress = min(1.0, into / decay_steps)
        falling = 1 - progress if self.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.lr * (self.final_lr + (1 - self.final_lr) * falling)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where text comes from, and what its tokens count in the loss.

    The loss of a step is the mean over tokens of text, each times its weight, plus the mean over tokens of answers and
    the full stops that end them, each times its weight: few answers weigh as much as many.

    Attributes:
        corpus: a prepared folder, `stdlib` for the Python standard library's sources, or empty for none.
        text_weight: what a synthetic row's bytes count that are no answer.
        answer_weight: what answers count.
        corpus_weight: what tokens of plain rows count.
        order: `windows` for plain rows at random places of the corpus, or `documents` for shuffled documents, one
            behind the other, all of them once before any comes again. The rows of a step lie one after the other there;
            the stretch of a row that is synthetic is passed over.
    """

    corpus: str = ""
    text_weight: float = 0.2
    answer_weight: float = 1.0
    corpus_weight: float = 1.0
    order: str = WINDOWS

    def __post_init__(self) -> None:
        if not isinstance(self.corpus, str):
            raise InvalidArgument(f"data.corpus = {shown(self.corpus)} must be 'stdlib' or a folder")
        for name in ("text_weight", "answer_weight", "corpus_weight"):
            check_number(f"data.{name}", getattr(self, name), 0, 1e6)
        check_choice("data.order", self.order, ORDERS)


PARTS = ("embedding", "convolution", "lower", "chunk_encoder", "upper", "norm", "output")  # what a model is made of


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A part of a run, with rows and a model setting of its own.

    Attributes:
        share: how long it is, relative to the other stages.
        seq_len: how many tokens the longest rows have.
        min_seq_len: how many the shortest have; each step draws one of at most 16 lengths for all its rows. None takes
            `seq_len`.
        batch_tokens: how many tokens a step takes, all processes together; as many rows as fit, and at least one.
        window, top_k, selection_noise: what the model has in this stage; None takes the model's config.
        frozen: the parts of the model whose weights do not move in this stage, of `PARTS`; a model may lack them.
        in_batch_memory: whether rows that a process takes together also see each other's chunks, as if they were
            earlier text, so that there are more chunks from which the right ones are to be told.
        synthetic_share: the share of rows that are retrieval samples; the others are plain text of the corpus.
        chain_share, late_share, similar_share, value_share, task_share: as in `tasks.mixture.Mixture`.
        num_needles, num_queries, min_episode: as there.
        tasks: the weight of each task of the evaluation in rows of `task_share`.
        min_distance: the least distance between needles and questions; None takes the window.
        haystacks: the weight of each haystack of retrieval samples: `noise`, `needles`, `corpus`, and `assignments`,
            which are pieces of the corpus that look like needles.
    """

    share: float = 1.0
    seq_len: int
    min_seq_len: int | None = None
    batch_tokens: int
    window: int | None = None
    top_k: int | None = None
    selection_noise: bool | None = None
    frozen: tuple[str, ...] = ()
    in_batch_memory: bool = False
    synthetic_share: float = 1.0
    chain_share: float = 0.0
    late_share: float = 0.0
    similar_share: float = 0.0
    value_share: float = 0.0
    task_share: float = 0.0
    tasks: Mapping[str, float] = field(default_factory=dict)
    num_needles: tuple[int, int] = (2, 6)
    num_queries: tuple[int, int] = (1, 4)
    min_distance: int | None = None
    min_episode: int | None = None
    haystacks: Mapping[str, float] = field(default_factory=lambda: {NOISE: 1.0})

    def __post_init__(self) -> None:
        check_number("stages.share", self.share, 1e-9, 1e9)
        check_count("stages.seq_len", self.seq_len, 2, 2**30)
        check_count("stages.batch_tokens", self.batch_tokens, 1, 2**40)
        for name, low in (("min_seq_len", 2), ("window", 1), ("top_k", 1), ("min_distance", 0), ("min_episode", 1)):
            if getattr(self, name) is not None:
                check_count(f"stages.{name}", getattr(self, name), low, 2**30)
        if self.shortest > self.seq_len:
            raise InvalidArgument(f"stages.min_seq_len = {self.shortest} must be at most seq_len = {self.seq_len}")
        for name in SHARES:
            check_number(f"stages.{name}", getattr(self, name), 0, 1)
        for name in ("num_needles", "num_queries"):
            object.__setattr__(self, name, pair(f"stages.{name}", getattr(self, name)))
        if not isinstance(self.frozen, list | tuple):
            raise InvalidArgument(f"stages.frozen = {shown(self.frozen)} must be a list of {', '.join(PARTS)}")
        object.__setattr__(self, "frozen", tuple(self.frozen))
        for part in self.frozen:
            check_choice("stages.frozen", part, PARTS)
        for name, allowed in (("haystacks", HAYSTACKS), ("tasks", tuple(TASKS))):
            self._check_weights(name, allowed)
        if self.batch_tokens // self.shortest >= MAX_ROWS:
            raise InvalidArgument(
                f"stages.batch_tokens = {self.batch_tokens} at rows of {self.shortest} must be below {MAX_ROWS} rows"
            )

    def _check_weights(self, name: str, allowed: tuple[str, ...]) -> None:
        weights = getattr(self, name)
        if not isinstance(weights, Mapping):
            raise InvalidArgument(f"stages.{name} = {shown(weights)} must be a table such as {{{allowed[0]} = 1.0}}")
        for each, weight in weights.items():
            check_choice(name.removesuffix("s"), each, allowed)
            check_number(f"stages.{name}.{each}", weight, 0, 1e9)

    @property
    def shortest(self) -> int:
        """How many tokens the shortest rows have."""
        return self.seq_len if self.min_seq_len is None else self.min_seq_len

    @property
    def needs_corpus(self) -> bool:
        """Whether rows or haystacks come from a corpus."""
        return self.synthetic_share < 1 or any(
            weight > 0 for name, weight in self.haystacks.items() if name not in MADE_HAYSTACKS
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """All that a run is made from.

    Attributes:
        model: the sizes and the variant of the model.
        train: optimization and records.
        data: where text comes from, and what it counts.
        stages: the stages, one after the other.
    """

    model: ModelConfig
    train: TrainConfig
    data: DataConfig
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise InvalidArgument("stages = [] must name at least one stage")
        if self.data.corpus and not any(stage.needs_corpus for stage in self.stages):
            raise InvalidArgument(
                f"data.corpus = {shown(self.data.corpus)} is used by no stage; allowed are a synthetic_share below 1, "
                "a weight of haystacks.corpus or haystacks.assignments, or no corpus"
            )
        if self.data.order != WINDOWS and all(stage.synthetic_share == 1 for stage in self.stages):
            raise InvalidArgument(
                f"data.order = {self.data.order!r} is used by no stage; allowed are a synthetic_share below 1, or "
                f"{WINDOWS!r}"
            )
        for number, stage in enumerate(self.stages):
            if stage.needs_corpus and not self.data.corpus:
                raise InvalidArgument(
                    f"stages.{number} takes text of a corpus and data.corpus is empty; allowed are stdlib and a folder"
                )
            self.model_in(stage)  # whether the stage's window and top-k are allowed
            if stage.synthetic_share and self.model.vocab_size < 256:
                raise InvalidArgument(
                    f"model.vocab_size = {self.model.vocab_size} must be at least 256: retrieval samples are bytes"
                )

    def model_in(self, stage: Stage) -> ModelConfig:
        """Returns the model's config with what the stage changes in it."""
        said = {name: getattr(stage, name) for name in ("window", "top_k", "selection_noise")}
        return replace(self.model, **{name: value for name, value in said.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, ready for JSON; `config_file.read_run_config` reads them."""
        return asdict(self)


_COUNTS = (
    ("steps", 1, 2**40),
    ("seed", 0, 2**31 - 1),
    ("warmup_steps", 0, 2**40),
    ("accumulation", 1, 2**20),
    ("context_parallel", 1, 2**20),
    ("expert_parallel", 1, 2**20),
    ("loss_chunk", 1, 2**30),
    ("log_every", 1, 2**40),
    ("save_every", 0, 2**40),
    ("keep_last", 1, 10_000),
    ("probe_every", 0, 2**40),
    ("probe_samples", 1, 100_000),
)
_NUMBERS = (
    ("lr", 0, 1e3),
    ("beta1", 0, 0.999999),
    ("beta2", 0, 0.999999),
    ("eps", 0, 1),
    ("weight_decay", 0, 1e3),
    ("decay_share", 0, 1),
    ("final_lr", 0, 1),
    ("clip", 0, 1e9),
    ("retrieval_loss", 0, 1e3),
    ("bias_update_rate", 0, 1),
    ("sharpen_scores", 1e-3, 1e3),
    ("peak_tflops", 0, 1e9),
)
