"""The bundled model for users of `transformers`: after `register()` its Auto classes read our directories."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hsa_compile.errors import InvalidArgument
from hsa_compile.files import make_directory, read_json, write_json
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.data.tokenizer import BYTES
from hsa_compile.model.pretrained import ARCHITECTURE, MODEL_TYPE, from_pretrained, read_tokenizer, save_pretrained
from hsa_compile.model.transformer import HSATransformer, empty_model
from hsa_compile.versions import missing

try:
    import transformers
    from transformers.modeling_outputs import CausalLMOutput
except ModuleNotFoundError as error:
    raise missing("transformers", "the bridge to transformers") from error

_IGNORED_LABEL = -100
_GENERATION_FILE = "generation_config.json"
# What `transformers` passes to models of every kind, and what says how a file is found; none of it changes ours.
_LOADING = {
    "adapter_kwargs", "attn_implementation", "cache_dir", "force_download", "local_files_only", "low_cpu_mem_usage",
    "proxies", "revision", "token", "trust_remote_code", "use_safetensors", "weights_only", "_commit_hash",
    "_from_auto",
}  # fmt: skip
_SAVING = {"max_shard_size", "safe_serialization", "save_function", "save_original_format", "save_peft_format", "token"}
_GENERATING = {"cache_position", "is_first_iteration", "next_sequence_length", "past_key_values", "use_cache"}
_CONTEXT = 2**24  # what programs take as the longest text: the length that the model is evaluated at


class HSACompileConfig(transformers.PretrainedConfig):
    """`config.json` as `transformers` sees it; `hsa_config` holds the fields of `ModelConfig`."""

    model_type = MODEL_TYPE

    def __init__(self, hsa_config: Mapping[str, Any] | None = None, **others: Any) -> None:
        self.hsa_config = dict(hsa_config) if hsa_config is not None else None
        if hsa_config is not None:  # `transformers` makes an empty one to see defaults
            config = ModelConfig.from_dict(hsa_config)
            others.setdefault("tie_word_embeddings", config.tie_embeddings)
            self.vocab_size, self.hidden_size = config.vocab_size, config.dim
            self.num_hidden_layers, self.num_attention_heads = config.num_layers, config.num_heads
        self.max_position_embeddings = _CONTEXT
        self.use_cache = False
        others.pop("use_cache", None)
        super().__init__(**others)


class HSACompileForCausalLM(transformers.PreTrainedModel, transformers.GenerationMixin):
    """`HSATransformer` behind the interface of `transformers`.

    There is no cache: `generate` of `transformers` runs the whole text for each token. `HSATransformer.generate`, on
    `.model`, reads the prompt once and keeps a memory.

    Args:
        config: a config with `hsa_config`.
        model: the model to wrap; a new one if None.
    """

    config_class = HSACompileConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    accepts_loss_kwargs: ClassVar[bool] = True  # `Trainer` asks: forward takes `num_items_in_batch`

    def __init__(self, config: HSACompileConfig, model: HSATransformer | None = None) -> None:
        super().__init__(config)
        if config.hsa_config is None:
            raise InvalidArgument("the config has no hsa_config, which holds the sizes of the model")
        self.model = HSATransformer(ModelConfig.from_dict(config.hsa_config)) if model is None else model
        self.generation_config.use_cache = False
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        config: HSACompileConfig | None = None,
        generation_config: Any = None,
        **others: Any,
    ) -> "HSACompileForCausalLM":
        """Reads a model that hsa-compile saved.

        Args:
            pretrained_model_name_or_path: the directory of the model.
            dtype: the dtype of the weights, also as `torch_dtype`; the saved one for None and `auto`.
            device_map: a device, `auto`, or `{"": device}`.
            config: the config of the directory, which Auto classes pass on.
            generation_config: how `generate` chooses tokens; the saved one if None.
            others: what says where `transformers` finds files, which has no meaning here.

        Raises:
            SaveError, InvalidArgument: for the reasons of `pretrained.from_pretrained`, or an argument is not allowed.
        """
        path = Path(pretrained_model_name_or_path)
        _refuse("from_pretrained", {name: value for name, value in others.items() if name not in _LOADING})
        device = device_map.get("", "auto") if isinstance(device_map, Mapping) else device_map or "cpu"
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model = from_pretrained(path, device=device, dtype=_dtype(dtype if dtype is not None else torch_dtype))
        if config is not None and config.hsa_config != model.config.to_dict():
            raise InvalidArgument(f"the config is not that of {path}; change what {path / 'config.json'} says instead")
        config = HSACompileConfig(
            hsa_config=model.config.to_dict(), name_or_path=str(path), architectures=[ARCHITECTURE]
        )
        config.dtype = model.embedding.weight.dtype
        found = cls(config, model).eval()
        if generation_config is None and (path / _GENERATION_FILE).exists():
            generation_config = transformers.GenerationConfig.from_dict(read_json(path / _GENERATION_FILE))
        if generation_config is not None:
            found.generation_config = generation_config
        return found

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **others: Any,
    ) -> None:
        """Writes a directory that `from_pretrained` reads; the weights are always one safetensors file.

        Args:
            save_directory: the directory; it is made if it is not there.
            is_main_process: whether this process writes; others pass False.
            state_dict: the weights to write, named as those of `state_dict()`; the model's own if None.
            others: what says how `transformers` splits and writes files, which has no meaning here.

        Raises:
            SaveError: a file cannot be written.
            InvalidArgument: the weights do not fit the model, or an argument is not allowed.
        """
        _refuse("save_pretrained", {name: value for name, value in others.items() if name not in _SAVING})
        if not is_main_process:
            return
        name = self.config.name_or_path
        tokenizer = read_tokenizer(name) if name and Path(name).is_dir() else BYTES
        model = self.model if state_dict is None else self._with_weights(state_dict)
        make_directory(Path(save_directory))
        write_json(Path(save_directory) / _GENERATION_FILE, json.loads(self.generation_config.to_json_string()))
        save_pretrained(model, save_directory, tokenizer=tokenizer)

    def _with_weights(self, weights: Mapping[str, Tensor]) -> HSATransformer:
        prefix = f"{self.base_model_prefix}."
        model = empty_model(self.model.config)
        try:
            model.load_state_dict({name.removeprefix(prefix): weights[name] for name in weights}, assign=True)
        except RuntimeError as error:
            raise InvalidArgument(f"state_dict does not fit the model: {error}") from error
        return model

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Does nothing: `HSATransformer` draws its own weights."""

    def get_input_embeddings(self) -> torch.nn.Module:
        """Returns the embedding."""
        return self.model.embedding

    def get_output_embeddings(self) -> torch.nn.Module | None:
        """Returns the output layer; None where it is the embedding."""
        return self.model.output

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Passes the whole text each time, since there is no cache, and what else the caller asked of forward."""
        return {"input_ids": input_ids, **{name: kwargs[name] for name in kwargs.keys() - _GENERATING}}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        *,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutput | tuple[Tensor, ...]:
        """Computes logits, and with labels the cross entropy of the next tokens.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, 1 at the text and 0 at padding, which may stand before or behind it.
            labels: `[B, T]`, −100 where nothing is asked; they are shifted here.
            return_dict: whether to return an object rather than a tuple; what the config says if None.
            logits_to_keep: how many last tokens get logits, 0 for all; or the places of the tokens that get them.
            num_items_in_batch: what the sum of the cross entropy is divided by, as `Trainer` passes it for batches that
                come in parts; the number of labels if None, so that the loss is a mean.
            others: what other models take; only None and False are allowed.

        Raises:
            InvalidArgument: the mask has a hole in a text or other values than 0 and 1, or an argument is not allowed.
        """
        for name in ("output_hidden_states", "output_attentions"):
            others.setdefault(name, getattr(self.config, name, None))
        _refuse("forward", others)
        first = None if attention_mask is None else _first_tokens(attention_mask, input_ids)
        if first is not None:
            # A text begins at position 0: padding before it is moved behind it, where it changes nothing.
            input_ids = _rolled(input_ids, first)
        hidden = self.model.hidden(input_ids)
        if first is not None:
            hidden = _rolled(hidden, -first)
        keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if labels is not None and not keeps_all:
            raise InvalidArgument("logits_to_keep with labels is not allowed: the loss needs the logits of all tokens")
        if not keeps_all:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            hidden = hidden[:, kept]
        logits = self.model.logits(hidden)
        loss = None
        if labels is not None:
            asked = labels[:, 1:].reshape(-1).to(logits.device)
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(),
                asked,
                ignore_index=_IGNORED_LABEL,
                reduction="mean" if num_items_in_batch is None else "sum",
            )
            if num_items_in_batch is not None:
                loss = loss / torch.as_tensor(num_items_in_batch, device=loss.device)
        if return_dict is False or (return_dict is None and not self.config.return_dict):
            return (logits,) if loss is None else (loss, logits)
        return CausalLMOutput(loss=loss, logits=logits)


class HSABytesTokenizer(transformers.PreTrainedTokenizer):
    """A tokenizer whose tokens are UTF-8 bytes; byte 0 ends a document and pads."""

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 as in the base class
    vocab_files_names: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, eos_token: str = "\0", pad_token: str = "\0", **others: Any) -> None:
        super().__init__(eos_token=eos_token, pad_token=pad_token, **others)

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


def register() -> None:
    """Makes `AutoConfig`, `AutoModelForCausalLM` and, for models of bytes, `AutoTokenizer` read our directories."""
    transformers.AutoConfig.register(MODEL_TYPE, HSACompileConfig, exist_ok=True)
    transformers.AutoModelForCausalLM.register(HSACompileConfig, HSACompileForCausalLM, exist_ok=True)
    transformers.AutoTokenizer.register(HSACompileConfig, slow_tokenizer_class=HSABytesTokenizer, exist_ok=True)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    return getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype


def _refuse(function: str, arguments: Mapping[str, Any]) -> None:
    """Raises InvalidArgument if somebody asks for something that would be ignored."""
    asked = [name for name, value in arguments.items() if value is not None and value is not False]
    if asked:
        raise InvalidArgument(f"{function} of this model does not take {', '.join(sorted(asked))}; leave it out")


def _first_tokens(mask: Tensor, input_ids: Tensor) -> Tensor | None:
    """Returns where each text begins, `[B]`; None if all begin at the first token."""
    if mask.shape != input_ids.shape:
        raise InvalidArgument(
            f"attention_mask has shape {list(mask.shape)}; that of input_ids, {list(input_ids.shape)}, is needed"
        )
    is_text = mask != 0
    begins = is_text & ~F.pad(is_text, (1, -1))
    if bool((begins.sum(dim=1) > 1).any()) or bool((is_text & (mask != 1)).any()):
        raise InvalidArgument(
            "attention_mask has 0 inside of a text, or values other than 0 and 1; allowed is one run of 1 in each row, "
            "with padding before or behind it"
        )
    return None if bool(is_text[:, 0].all()) else is_text.long().argmax(dim=1)


def _rolled(x: Tensor, by: Tensor) -> Tensor:
    """Moves row b of `x [B, T, …]` left by `by[b]`; what leaves at the left comes in at the right."""
    index = (torch.arange(x.shape[1], device=x.device) + by[:, None].to(x.device)) % x.shape[1]
    return x.gather(1, index.view(*index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))
