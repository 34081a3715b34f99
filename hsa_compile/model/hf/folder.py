"""A directory as the Hugging Face Hub expects it: the model with its tokenizer, generation config and model card."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers

from hsa_compile.checks import one_line
from hsa_compile.errors import SaveError
from hsa_compile.files import make_directory, read_json, read_regular, replace_file, replace_text, write_json
from hsa_compile.model.config import PERPLEXITY
from hsa_compile.model.cost.info import model_info
from hsa_compile.model.data.tokenizer import BYTES
from hsa_compile.model.pretrained import MODULE, read_tokenizer, save_pretrained
from hsa_compile.model.transformer import HSATransformer

GENERATION_FILE, CARD_FILE = "generation_config.json", "README.md"
_TOKENIZER_FILE, _TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
_DOWNLOADING = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_RESULTS = ("results.json", "evaluation/results.json")  # what `hsa-compile eval --out` wrote beside the model


class HSABytesTokenizer(transformers.PreTrainedTokenizer):
    """A tokenizer whose tokens are UTF-8 bytes; byte 0 ends a document and pads, before a text as `generate` needs."""

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 as in the base class
    vocab_files_names: dict[str, str] = {}  # noqa: RUF012
    padding_side = "left"

    def __init__(self, eos_token: str = "\0", pad_token: str = "\0", **others: Any) -> None:
        super().__init__(eos_token=eos_token, pad_token=pad_token, **others)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoTokenizer") -> None:
        """Does nothing, as `HSACompileConfig.register_for_auto_class`."""

    @property
    def vocab_size(self) -> int:
        """The number of bytes, 256."""
        return 256

    def get_vocab(self) -> dict[str, int]:
        """Returns bytes as the characters of the same number."""
        return {chr(byte): byte for byte in range(256)}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [chr(byte) for byte in text.encode()]

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Joins tokens to text; bytes that are no UTF-8 become U+FFFD."""
        return bytes(ord(token) for token in tokens).decode(errors="replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Saves nothing: there is no vocabulary."""
        return ()


def write_folder(
    model: HSATransformer, directory: Path, generation: transformers.GenerationConfig, *, source: Path | None
) -> None:
    """Writes all that the Hub and Auto classes ask of a model's directory.

    Args:
        model: the model.
        directory: where it is written; it is made if it is not there. A model card that is there stays.
        generation: how `generate` chooses tokens.
        source: the directory that the model was read from, for its tokenizer and the results of its evaluation; None
            for a new model, whose tokens are bytes.

    Raises:
        SaveError: a file cannot be written, or a file of the source cannot be read.
    """
    make_directory(directory)
    name = read_tokenizer(source) if source is not None and source.is_dir() else BYTES
    write_json(directory / GENERATION_FILE, json.loads(generation.to_json_string()))
    write_json(directory / _TOKENIZER_CONFIG_FILE, _tokenizer_config(name))
    if name != BYTES:
        assert source is not None
        _copy(source / name, directory / _TOKENIZER_FILE)
    save_pretrained(model, directory, tokenizer=BYTES if name == BYTES else _TOKENIZER_FILE)
    if not (directory / CARD_FILE).exists():
        text = _card(model, directory.resolve().name, [place for place in (source, directory) if place is not None])
        replace_text(directory / CARD_FILE, text)


def download(name: str, options: Mapping[str, Any]) -> Path:
    """Returns where the files of a model of the Hub lie on this machine; those that are not there yet are fetched.

    Args:
        name: `user/name`.
        options: those of `snapshot_download` are passed on, and others left out.

    Raises:
        SaveError: there is no such model, or the Hub does not answer.
    """
    asked = {key: value for key, value in options.items() if key in _DOWNLOADING and value is not None}
    try:
        return Path(huggingface_hub.snapshot_download(name, **asked))
    except (OSError, ValueError) as error:
        raise SaveError(f"{name} is no directory, and the Hub does not give it: {one_line(error)}") from error


def upload(
    directory: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Uploads a directory to the Hub and returns the address of the commit; a model card that is there stays."""
    api = huggingface_hub.HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    kept = [CARD_FILE] if api.file_exists(repo_id, CARD_FILE, revision=revision) else None
    return str(
        api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            revision=revision,
            commit_message=message or "Upload model",
            ignore_patterns=kept,
        )
    )


def _tokenizer_config(name: str) -> dict[str, Any]:
    if name != BYTES:
        return {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
    return {
        "tokenizer_class": HSABytesTokenizer.__name__,
        "padding_side": "left",
        "auto_map": {"AutoTokenizer": [f"{MODULE}.{HSABytesTokenizer.__name__}", None]},
    }


def _copy(source: Path, target: Path) -> None:
    try:
        content = read_regular(source)
    except OSError as error:
        raise SaveError(f"tokenizer {source} cannot be read: {error.strerror or error}") from error
    replace_file(target, lambda temporary: temporary.write_bytes(content))


def _card(model: HSATransformer, name: str, places: list[Path]) -> str:
    """Returns the model card: what the Hub reads, what the model is, how to use it, and how it was evaluated."""
    config, info = model.config, model_info(model.config)
    header = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [hsa-compile, long-context]\n---\n"
    memory = f", chunks of {config.chunk_size} tokens of which each token reads {config.top_k}"
    use = (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)\n'
        'prompt = tokenizer("Once", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))\n```\n"
    )
    found = next((place / file for place in places for file in _RESULTS if (place / file).is_file()), None)
    return (
        f"{header}\n# {name}\n\nA language model of the variant `{config.variant}` with {info.parameters:,} parameters"
        f"{memory if config.has_memory else ''}. It was saved by hsa-compile, which must be installed with its extra "
        f"`hf` to use it:\n\n{use}" + ("" if found is None else f"\n## Evaluation\n\n{_evaluation(found)}")
    )


def _evaluation(path: Path) -> str:
    """Returns what `hsa-compile eval` found as Markdown tables: retrieval over all depths, and perplexity."""
    results = read_json(path)
    try:
        retrieval = [
            f"| {cell['task']} | {cell['haystack']} | {cell['protocol']} | {cell['length']:,} "
            f"| {100 * cell['accuracy']:.1f} % | {100 * cell['low']:.1f} – {100 * cell['high']:.1f} % "
            f"| {cell['samples']} |"
            for cell in results["retrieval"]
            if cell["depth"] is None
        ]
        perplexity = [
            f"| {PERPLEXITY} | {each['source']} | | {each['length']:,} | {each['perplexity']:.4g} | "
            f"| {each['num_texts']} |"
            for each in results["perplexity"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise SaveError(f"{path} holds no results of `hsa-compile eval`: {error!r}") from error
    header = "| task | text | protocol | length | result | 95 % interval | samples |\n|---|---|---|---|---|---|---|\n"
    return header + "".join(f"{row}\n" for row in retrieval + perplexity)
