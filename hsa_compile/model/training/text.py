"""The text of a run: its corpus, and the mixtures that its stages draw rows from."""

from pathlib import Path

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.data.corpus import TokenCorpus
from hsa_compile.model.data.manifest import TRAIN, VALIDATION
from hsa_compile.model.data.stdlib import stdlib_corpus
from hsa_compile.model.tasks.haystack import (
    NOISE,
    STDLIB,
    Haystack,
    NoiseHaystack,
    assignment_haystack,
    corpus_haystack,
)
from hsa_compile.model.tasks.mixture import Mixture
from hsa_compile.model.training.config import ASSIGNMENT_HAYSTACK, RunConfig


def open_corpus(run: RunConfig, split: str = TRAIN) -> TokenCorpus | None:
    """The corpus of a run, or None if it has none; that of the standard library is prepared where it is not there.

    Raises:
        CorpusError: it is incomplete or damaged, or cannot be written.
    """
    if not run.data.corpus:
        return None
    if run.data.corpus != STDLIB:
        return TokenCorpus(Path(run.data.corpus).expanduser(), split=split)
    return stdlib_corpus(split)


def mixtures(run: RunConfig, corpus: TokenCorpus | None) -> tuple[Mixture, ...]:
    """What each stage draws its rows from.

    Raises:
        InvalidArgument: a stage's numbers do not fit together.
    """
    return tuple(
        Mixture(
            haystacks=tuple((_haystack(name, corpus), weight) for name, weight in stage.haystacks.items()),
            corpus=corpus,
            synthetic_share=stage.synthetic_share,
            chain_share=stage.chain_share,
            late_share=stage.late_share,
            similar_share=stage.similar_share,
            num_needles=stage.num_needles,
            num_queries=stage.num_queries,
            min_distance=run.model_in(stage).window if stage.min_distance is None else stage.min_distance,
            min_episode=stage.min_episode,
            text_weight=run.data.text_weight,
            answer_weight=run.data.answer_weight,
            corpus_weight=run.data.corpus_weight,
        )
        for stage in run.stages
    )


def _haystack(name: str, corpus: TokenCorpus | None) -> Haystack:
    if name == NOISE:
        return NoiseHaystack()
    assert corpus is not None  # checked by RunConfig
    return (assignment_haystack if name == ASSIGNMENT_HAYSTACK else corpus_haystack)(corpus)


def check_rows(run: RunConfig, by_stage: tuple[Mixture, ...], world_size: int) -> None:
    """Whether each stage has room for needles, text enough, and a row for each process.

    Raises:
        InvalidArgument: it has not.
    """
    for number, (stage, mixture) in enumerate(zip(run.stages, by_stage, strict=True)):
        if stage.synthetic_share and stage.shortest < mixture.least_length:
            raise InvalidArgument(
                f"stages.{number}: rows of {stage.shortest} are too short for a retrieval sample with a distance of "
                f"{mixture.min_distance}; allowed is {mixture.least_length} or more"
            )
        if mixture.corpus is not None and stage.seq_len > len(mixture.corpus):
            raise InvalidArgument(
                f"stages.{number}.seq_len = {stage.seq_len} is more than the {len(mixture.corpus)} tokens of "
                f"{mixture.corpus.directory}"
            )
        if max(1, stage.batch_tokens // stage.seq_len) < world_size:
            raise InvalidArgument(
                f"stages.{number}.batch_tokens = {stage.batch_tokens} must be at least {world_size * stage.seq_len}: a "
                f"row of {stage.seq_len} for each of {world_size} processes"
            )


def held_out_mixture(run: RunConfig, corpus: TokenCorpus | None) -> Mixture:
    """What the last stage draws from, of text that no step sees where there is enough of it.

    Args:
        run: of the run.
        corpus: that it trains on.
    """
    if corpus is not None:
        validation = TokenCorpus(corpus.directory, split=VALIDATION)
        if len(validation) >= max(stage.seq_len for stage in run.stages):
            corpus = validation
    return mixtures(run, corpus)[-1]


def digest(corpus: TokenCorpus | None) -> str:
    """Of the text that is trained on; empty without a corpus."""
    return corpus.manifest.splits[TRAIN].tokens_sha256 if corpus is not None else ""
