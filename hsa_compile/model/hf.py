"""The bundled model for users of `transformers`: after `register()` its Auto classes read our directories."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.data.tokenizer import BYTES
from hsa_compile.model.pretrained import ARCHITECTURE, MODEL_TYPE, from_pretrained, read_tokenizer, save_pretrained
from hsa_compile.model.transformer import HSATransformer
from hsa_compile.versions import missing

try:
    import transformers
    from transformers.modeling_outputs import CausalLMOutput
except ModuleNotFoundError as error:
    raise missing("transformers", "the bridge to transformers") from error

_IGNORED_LABEL = -100
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
        *_: Any,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        **__: Any,
    ) -> "HSACompileForCausalLM":
        """Reads a model that hsa-compile saved; what else `transformers` lets one choose has no meaning here.

        Args:
            pretrained_model_name_or_path: the directory of the model.
            dtype: the dtype of the weights, also as `torch_dtype`; the saved one for None and `auto`.
            device_map: a device, `auto`, or `{"": device}`.

        Raises:
            SaveError, InvalidArgument: for the reasons of `pretrained.from_pretrained`.
        """
        path = Path(pretrained_model_name_or_path)
        device = device_map.get("", "auto") if isinstance(device_map, Mapping) else device_map or "cpu"
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model = from_pretrained(path, device=device, dtype=_dtype(dtype if dtype is not None else torch_dtype))
        config = HSACompileConfig(
            hsa_config=model.config.to_dict(), name_or_path=str(path), architectures=[ARCHITECTURE]
        )
        config.dtype = model.embedding.weight.dtype
        return cls(config, model).eval()

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Writes a directory that `from_pretrained` reads."""
        name = self.config.name_or_path
        tokenizer = read_tokenizer(name) if name and Path(name).is_dir() else BYTES
        save_pretrained(self.model, save_directory, tokenizer=tokenizer)

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Does nothing: `HSATransformer` draws its own weights."""

    def get_input_embeddings(self) -> torch.nn.Module:
        """Returns the embedding."""
        return self.model.embedding

    def get_output_embeddings(self) -> torch.nn.Module | None:
        """Returns the output layer; None where it is the embedding."""
        return self.model.output

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        """Passes the whole text each time, since there is no cache."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> CausalLMOutput | tuple[Tensor, ...]:
        """Computes logits, and with labels the mean cross entropy of the next tokens.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, 0 at padding, which may stand before or behind a text.
            labels: `[B, T]`, −100 where nothing is asked; they are shifted here.
            return_dict: whether to return an object rather than a tuple; only False gives a tuple.
        """
        first = None
        if attention_mask is not None and not bool(attention_mask[:, 0].all()):
            # A text begins at position 0: padding before it is moved behind it, where it changes nothing.
            first = attention_mask.long().argmax(dim=1)
            input_ids = _rolled(input_ids, first)
        logits = self.model(input_ids)
        if first is not None:
            logits = _rolled(logits, -first)
        loss = None
        if labels is not None:
            asked = labels[:, 1:].reshape(-1).to(logits.device)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), asked, ignore_index=_IGNORED_LABEL)
        if return_dict is False:
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


def _rolled(x: Tensor, by: Tensor) -> Tensor:
    """Moves row b of `x [B, T, …]` left by `by[b]`; what leaves at the left comes in at the right."""
    index = (torch.arange(x.shape[1], device=x.device) + by[:, None].to(x.device)) % x.shape[1]
    return x.gather(1, index.view(*index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))
