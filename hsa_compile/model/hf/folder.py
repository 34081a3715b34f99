"""A directory as the Hugging Face Hub expects it: the model, with its configs, tokenizer and model card."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import tokenizers
import torch
import transformers

from hsa_compile.checks import check_text, one_line, shown
from hsa_compile.errors import InvalidArgument, SaveError
from hsa_compile.files import make_directory, read_json, replace_text, write_json
from hsa_compile.model.config import PERPLEXITY, ModelConfig
from hsa_compile.model.cost.info import model_info
from hsa_compile.model.data.tokenizer import BYTES, FileTokenizer, Tokenizer, load_tokenizer
from hsa_compile.model.pretrained import MODEL_TYPE, MODULE, save_pretrained
from hsa_compile.model.transformer import HSATransformer

GENERATION_FILE, CARD_FILE = "generation_config.json", "README.md"
_TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_DOWNLOADING = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_AUTO = ("_commit_hash", "_from_auto", "proxies", "trust_remote_code", *_DOWNLOADING)  # what is no tokenizer's option
_CONTEXT = 2**24  # what programs take as the longest text: the length that the model is evaluated at
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_RESULTS = ("results.json", "evaluation/results.json")  # what `hsa-compile eval --out` wrote beside the model


class HSACompileConfig(transformers.PretrainedConfig):
    """`config.json` as `transformers` sees it.

    Args:
        hsa_config: the fields of `ModelConfig`.
        tokenizer: `bytes`, or the name of the tokenizer's file in the directory `name_or_path`.
        others: what `transformers` keeps in every config, such as `name_or_path`.

    Raises:
        InvalidArgument: a value is not allowed.
    """

    model_type = MODEL_TYPE

    def __init__(
        self, hsa_config: Mapping[str, Any] | None = None, tokenizer: str = BYTES, **others: Any
    ) -> None:  # fmt: skip
        check_text("tokenizer", tokenizer)
        if Path(tokenizer).name != tokenizer:
            raise InvalidArgument(f"tokenizer = {tokenizer!r} must be bytes or the name of a file beside the model")
        self.tokenizer = tokenizer
        self.hsa_config = dict(hsa_config) if hsa_config is not None else None
        if hsa_config is not None:  # `transformers` makes an empty one to see defaults
            config = ModelConfig.from_dict(hsa_config)
            others.setdefault("tie_word_embeddings", config.tie_embeddings)
            self.vocab_size, self.hidden_size = config.vocab_size, config.dim
            self.num_hidden_layers, self.num_attention_heads = config.num_layers, config.num_heads
        self.max_position_embeddings = _CONTEXT
        super().__init__(**others | {"dtype": dtype_of(others.get("dtype"))})

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Does nothing: a directory of ours names the module that imports this class, which need not be copied."""


class HSABytesTokenizer(transformers.PreTrainedTokenizer):
    """A tokenizer whose tokens are UTF-8 bytes; byte 0 ends a document and pads, before a text as `generate` needs."""

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 as in the base class
    vocab_files_names: dict[str, str] = {}  # noqa: RUF012
    padding_side = "left"

    def __init__(self, eos_token: str = "\0", pad_token: str = "\0", **others: Any) -> None:
        super().__init__(eos_token=eos_token, pad_token=pad_token, **others)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *inputs: Any, **others: Any) -> Any:
        """Reads the tokenizer of a model; if that has a tokenizer file, one of the class that such files have.

        Args:
            pretrained_model_name_or_path: the directory of the model, or its name on the Hub.
            inputs, others: as in `transformers`.

        Returns:
            a tokenizer of this class, or a `PreTrainedTokenizerFast`.

        Raises:
            InvalidArgument, SaveError: for the reasons of `find_tokenizer`.
        """
        config, _ = transformers.PretrainedConfig.get_config_dict(pretrained_model_name_or_path, **others)
        tokenizer = find_tokenizer(pretrained_model_name_or_path, config.get("tokenizer", BYTES), others)
        if not isinstance(tokenizer, FileTokenizer):
            return super().from_pretrained(pretrained_model_name_or_path, *inputs, **others)
        options = {name: value for name, value in others.items() if name not in _AUTO}
        content = tokenizers.Tokenizer.from_buffer(tokenizer.content)
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=content, **{"padding_side": "left", **_special_tokens(tokenizer), **options}
        )

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
    model: HSATransformer,
    directory: Path,
    generation: transformers.GenerationConfig,
    *,
    tokenizer: Tokenizer,
    extra: Mapping[str, Any],
    source: Path | None,
) -> None:
    """Writes all that the Hub and Auto classes ask of a model's directory.

    Args:
        model: the model.
        directory: where it is written; it is made if it is not there. A model card that is there stays.
        generation: how `generate` chooses tokens.
        tokenizer: what turns texts into the model's tokens.
        extra: as in `pretrained.save_pretrained`.
        source: the directory that the model was read from, for the results of its evaluation; None for a new model.

    Raises:
        SaveError: a file cannot be written, or the results cannot be read.
    """
    make_directory(directory)
    write_json(directory / GENERATION_FILE, json.loads(generation.to_json_string()))
    write_json(directory / _TOKENIZER_CONFIG_FILE, _tokenizer_config(tokenizer))
    save_pretrained(model, directory, tokenizer=tokenizer, extra=extra)
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


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Returns the dtype that a person named, None for the saved one; raises InvalidArgument if it is none."""
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise InvalidArgument(f"dtype = {shown(dtype)} is not allowed; weights are {', '.join(_DTYPES)}, or auto")
    return found


def device_of(device_map: Any) -> torch.device:
    """Returns the device for a model, which is never split, the CPU if None; raises InvalidArgument if it is none."""
    device: Any = device_map.get("") if isinstance(device_map, Mapping) and len(device_map) == 1 else device_map
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device("cpu" if device_map is None else device)
    except (RuntimeError, TypeError) as error:
        raise InvalidArgument(
            f"device_map = {shown(device_map)} is not allowed; it is a device, auto, or {{'': device}}"
        ) from error


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


def find_tokenizer(name: str | Path, file: str, options: Mapping[str, Any]) -> Tokenizer:
    """Loads the tokenizer of a model.

    Args:
        name: the directory of the model, or its name on the Hub.
        file: `bytes`, or the name of the tokenizer's file, as the model's config has it.
        options: as in `download`.

    Returns:
        the tokenizer, as our commands use it.

    Raises:
        InvalidArgument: the file is not there, or is no tokenizer.
        SaveError: the Hub does not give it.
    """
    if file == BYTES:
        return load_tokenizer(BYTES)
    if Path(name).is_dir():
        return load_tokenizer(Path(name) / file)
    asked = {key: value for key, value in options.items() if key in _DOWNLOADING}
    try:
        return load_tokenizer(transformers.utils.cached_file(str(name), file, **asked))
    except OSError as error:
        raise SaveError(f"{name} is no directory, and the Hub does not give its {file}: {one_line(error)}") from error


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Returns the token that ends a document, which also pads, as byte 0 does; nothing if the file has none."""
    if tokenizer.separator is None:
        return {}
    return dict.fromkeys(("eos_token", "pad_token"), tokenizer.decode([tokenizer.separator]))


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    if tokenizer.name != BYTES:
        return {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left", **_special_tokens(tokenizer)}
    return {
        "tokenizer_class": HSABytesTokenizer.__name__,
        "padding_side": "left",
        "auto_map": {"AutoTokenizer": [f"{MODULE}.{HSABytesTokenizer.__name__}", None]},
    }


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
