"""The bundled model behind the interfaces of `transformers`: `HSATransformer` as a causal model."""

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

from hsa_compile.errors import InvalidArgument
from hsa_compile.files import read_json
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.data.tokenizer import BYTES
from hsa_compile.model.hf.cache import HSACache, first_tokens, rolled
from hsa_compile.model.hf.folder import (
    GENERATION_FILE,
    HSACompileConfig,
    device_of,
    download,
    dtype_of,
    find_tokenizer,
    upload,
    write_folder,
)
from hsa_compile.model.pretrained import (
    ARCHITECTURE,
    AUTO_MAP,
    from_pretrained,
    read_extra,
    read_tokenizer,
)
from hsa_compile.model.transformer import HSATransformer, empty_model

_IGNORED_LABEL = -100
# What `transformers` passes to models of every kind, and what says how a file is found; none of it changes ours.
_LOADING = {
    "adapter_kwargs", "attn_implementation", "cache_dir", "force_download", "local_files_only", "low_cpu_mem_usage",
    "proxies", "revision", "token", "trust_remote_code", "use_safetensors", "weights_only", "_commit_hash",
    "_from_auto",
}  # fmt: skip
_SAVING = {"max_shard_size", "safe_serialization", "save_function", "save_original_format", "save_peft_format", "token"}


class HSACompileForCausalLM(transformers.PreTrainedModel, transformers.GenerationMixin):
    """`HSATransformer` behind the interface of `transformers`.

    `generate` reads a prompt once, into an `HSACache`, and then goes on token by token at the same cost at any length;
    with `use_cache=False` it reads the whole text again for each token.

    Args:
        config: a config with `hsa_config`.
        model: the model to wrap; a new one if None.

    Raises:
        InvalidArgument, SaveError: the config is not allowed, or its tokenizer cannot be read.
    """

    config_class = HSACompileConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    accepts_loss_kwargs: ClassVar[bool] = True  # `Trainer` asks: forward takes `num_items_in_batch`
    supports_gradient_checkpointing = True
    _is_stateful: ClassVar[bool] = True  # so that assisted generation, which takes tokens back, is refused

    def __init__(self, config: HSACompileConfig, model: HSATransformer | None = None) -> None:
        super().__init__(config)
        if config.hsa_config is None:
            raise InvalidArgument("the config has no hsa_config, which holds the sizes of the model")
        self.model = HSATransformer(ModelConfig.from_dict(config.hsa_config)) if model is None else model
        self.register_load_state_dict_pre_hook(_name_as_here)
        self._tokenizer = find_tokenizer(config.name_or_path, config.tokenizer, {})
        self._extra: dict[str, Any] = {}
        self.post_init()
        self._end_documents(self.generation_config)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Does nothing, for the reason that the config's has."""

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
            pretrained_model_name_or_path: the directory of the model, or its name on the Hub.
            dtype: the dtype of the weights, also as `torch_dtype`; the saved one for None and `auto`.
            device_map: a device, `auto`, or `{"": device}`.
            config: the config of the directory, which Auto classes pass on.
            generation_config: how `generate` chooses tokens; the saved one if None.
            others: what says how the Hub is asked, such as `revision`; the rest has no meaning here.

        Raises:
            SaveError, InvalidArgument: for the reasons of `pretrained.from_pretrained`, or an argument is not allowed.
        """
        _refuse("from_pretrained", {name: value for name, value in others.items() if name not in _LOADING})
        path = Path(pretrained_model_name_or_path)
        if not path.is_dir():
            path = download(str(pretrained_model_name_or_path), others)
        chosen = dtype_of(dtype if dtype is not None else torch_dtype)
        model = from_pretrained(path, device=device_of(device_map), dtype=chosen)
        if config is not None and config.hsa_config != model.config.to_dict():
            raise InvalidArgument(f"the config is not that of {path}; change what {path / 'config.json'} says instead")
        found = cls.of(model, name_or_path=str(path.resolve()))
        if generation_config is None and (path / GENERATION_FILE).exists():
            generation_config = transformers.GenerationConfig.from_dict(read_json(path / GENERATION_FILE))
            found._end_documents(generation_config)
        if generation_config is not None:
            found.generation_config = generation_config
        return found

    @classmethod
    def of(cls, model: HSATransformer, *, name_or_path: str = "") -> "HSACompileForCausalLM":
        """Wraps a model, in evaluation mode.

        Args:
            model: the model.
            name_or_path: the directory that it was read from; empty for a new model, whose tokens are bytes.

        Raises:
            SaveError, InvalidArgument: the directory holds no model, or not its tokenizer.
        """
        config = HSACompileConfig(
            hsa_config=model.config.to_dict(),
            name_or_path=name_or_path,
            architectures=[ARCHITECTURE],
            auto_map=dict(AUTO_MAP),
            tokenizer=read_tokenizer(name_or_path) if name_or_path else BYTES,
        )
        config.dtype = model.embedding.weight.dtype
        found = cls(config, model).eval()
        if name_or_path:
            found._extra = read_extra(name_or_path)
        return found

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **others: Any,
    ) -> None:
        """Writes a directory that `from_pretrained` reads, and that can be uploaded to the Hub as it is.

        It gets the weights, always as one safetensors file, the config, the module for `trust_remote_code`, the
        tokenizer, `generation_config.json`, and a model card if there is none. What `read_extra` found where the model
        was read from stays with it.

        Args:
            save_directory: the directory; it is made if it is not there.
            is_main_process: whether this process writes; others pass False.
            state_dict: the weights to write, named as those of `state_dict()`; the model's own if None.
            push_to_hub: whether to upload the directory afterwards, under its name.
            others: what says how `transformers` splits and writes files, which has no meaning here.

        Raises:
            SaveError: a file cannot be written.
            InvalidArgument: the weights do not fit the model, or an argument is not allowed.
        """
        _refuse("save_pretrained", {name: value for name, value in others.items() if name not in _SAVING})
        if not is_main_process:
            return
        directory, name = Path(save_directory), self.config.name_or_path
        model = self.model if state_dict is None else self._with_weights(state_dict)
        write_folder(
            model,
            directory,
            self.generation_config,
            tokenizer=self._tokenizer,
            extra=self._extra,
            source=Path(name) if name else None,
        )
        if push_to_hub:
            upload(directory, directory.resolve().name, token=others.get("token"))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        **others: Any,
    ) -> str:
        """Uploads what `save_pretrained` writes, with the model card, and returns the address of the commit.

        Args:
            repo_id: the name of the repository, `user/name`; it is made if it is not there.
            private, token, revision, commit_message: as in `huggingface_hub`.
            others: what `transformers` takes for models that are written in parts, which has no meaning here.
        """
        _refuse("push_to_hub", {name: value for name, value in others.items() if name not in _SAVING})
        with TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            return upload(
                Path(directory), repo_id, private=private, token=token, revision=revision, message=commit_message
            )

    def _with_weights(self, weights: Mapping[str, Tensor]) -> HSATransformer:
        prefix = f"{self.base_model_prefix}."
        model = empty_model(self.model.config)
        try:
            model.load_state_dict({name.removeprefix(prefix): weights[name] for name in weights}, assign=True)
        except RuntimeError as error:
            raise InvalidArgument(f"state_dict does not fit the model: {error}") from error
        return model

    def _end_documents(self, generation: transformers.GenerationConfig) -> None:
        """Lets `generate` end with a document, unless it is said what it ends with."""
        if generation.eos_token_id is None:
            generation.eos_token_id = self._tokenizer.separator
        if generation.pad_token_id is None:
            generation.pad_token_id = self._tokenizer.separator

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Does nothing: `HSATransformer` draws its own weights."""

    def _prepare_cache_for_generation(
        self, generation_config: transformers.GenerationConfig, model_kwargs: dict[str, Any], *others: Any
    ) -> None:
        """Makes an `HSACache` where `generate` would make a cache of keys and values."""
        asked = generation_config.cache_implementation
        if asked not in (None, "dynamic"):
            raise InvalidArgument(f"cache_implementation = {asked!r} is not allowed: this model reads into an HSACache")
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = HSACache(self.model)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *others)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether training computes the layers again in the backward pass instead of keeping what they made."""
        return self.model.checkpoint_activations

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, every_n_layers: int = 1
    ) -> None:
        options = getattr(gradient_checkpointing_func, "keywords", {})
        asked = {name: value for name, value in options.items() if (name, value) != ("use_reentrant", False)}
        if asked or every_n_layers != 1:
            raise InvalidArgument(
                f"gradient checkpointing with every_n_layers = {every_n_layers} and {asked} is not allowed; this model "
                "checkpoints every layer, with use_reentrant = False and no other option"
            )
        self.model.checkpoint_activations = enable

    def get_input_embeddings(self) -> torch.nn.Module:
        """Returns the embedding."""
        return self.model.embedding

    def get_output_embeddings(self) -> torch.nn.Module | None:
        """Returns the output layer; None where it is the embedding."""
        return self.model.output

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: HSACache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Computes logits, and with labels the cross entropy of the next tokens.

        Args:
            input_ids: `[B, T]`; with a cache, the tokens behind those that were read.
            attention_mask: `[B, T]`, 1 at the text and 0 at padding, which may stand before or behind it; with a cache,
                `[B, past + T]` and only before it.
            past_key_values: the cache to read on from, which this call changes in place.
            inputs_embeds: `[B, T, dim]`, embeddings instead of `input_ids`.
            labels: `[B, T]`, −100 where nothing is asked; they are shifted here.
            use_cache: whether to read into a new cache where none is given: in evaluation mode, without gradients.
            output_hidden_states: whether to return the embeddings and the outputs of all layers, the last one behind
                the norm; what the config says if None. Not with a cache.
            return_dict: whether to return an object rather than a tuple; what the config says if None.
            logits_to_keep: how many last tokens get logits, 0 for all; or the places of the tokens that get them.
            num_items_in_batch: what the sum of the cross entropy is divided by, as `Trainer` passes it for batches that
                come in parts; the number of labels if None, so that the loss is a mean.
            others: what other models take; only None and False are allowed.

        Raises:
            InvalidArgument: the mask has a hole in a text or other values than 0 and 1, or an argument is not allowed.
        """
        others.setdefault("output_attentions", self.config.output_attentions)
        _refuse("forward", others)
        if (input_ids is None) == (inputs_embeds is None):
            raise InvalidArgument("exactly one of input_ids and inputs_embeds is needed")
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        assert tokens is not None
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if use_cache or past_key_values is not None:
            _refuse(
                "forward with a cache",
                {"labels": None if labels is None else True, "output_hidden_states": output_hidden_states},
            )
            output = self._read(tokens, attention_mask, past_key_values, logits_to_keep)
        else:
            outputs: list[Tensor] | None = [] if output_hidden_states else None
            output = self._compute(tokens, attention_mask, labels, logits_to_keep, num_items_in_batch, outputs)
        with_names = self.config.return_dict if return_dict is None else return_dict
        return output if with_names else output.to_tuple()

    def _read(
        self, tokens: Tensor, mask: Tensor | None, cache: HSACache | None, logits_to_keep: int | Tensor
    ) -> CausalLMOutputWithPast:
        if cache is not None and not isinstance(cache, HSACache):
            raise InvalidArgument(f"past_key_values is a {type(cache).__name__}; this model reads into an HSACache")
        cache = HSACache(self.model) if cache is None else cache
        only_last = isinstance(logits_to_keep, int) and logits_to_keep == 1
        logits = cache.read(tokens, mask, only_last=only_last)
        return CausalLMOutputWithPast(
            logits=logits if only_last else logits[:, _kept(logits_to_keep)], past_key_values=cache
        )

    def _compute(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        labels: Tensor | None,
        logits_to_keep: int | Tensor,
        num_items: int | Tensor | None,
        outputs: list[Tensor] | None,
    ) -> CausalLMOutputWithPast:
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise InvalidArgument("logits_to_keep with labels is not allowed: the loss needs the logits of all tokens")
        first = None if mask is None else first_tokens(mask, tokens.shape[:2])
        if first is not None:
            # A text begins at position 0: padding before it is moved behind it, where it changes nothing.
            tokens = rolled(tokens, first)
        hidden = self.model.hidden(tokens, outputs=outputs)
        if outputs is not None:
            outputs[-1] = hidden
        if first is not None:
            hidden = rolled(hidden, -first)
            outputs = None if outputs is None else [rolled(output, -first) for output in outputs]
        logits = self.model.logits(hidden[:, _kept(logits_to_keep)])
        return CausalLMOutputWithPast(
            loss=None if labels is None else _loss(logits, labels, num_items),
            logits=logits,
            hidden_states=None if outputs is None else tuple(outputs),
        )


def _name_as_here(
    module: torch.nn.Module, weights: dict[str, Any], prefix: str, *_: Any
) -> None:  # fmt: skip
    """Lets `load_state_dict`, which `Trainer` calls, take the names in our files, which lack the name of `.model`."""
    own = f"{prefix}{HSACompileForCausalLM.base_model_prefix}."
    for name in [name for name in weights if name.startswith(prefix) and not name.startswith(own)]:
        weights[own + name.removeprefix(prefix)] = weights.pop(name)


def _loss(logits: Tensor, labels: Tensor, num_items: int | Tensor | None) -> Tensor:
    loss = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        labels[:, 1:].reshape(-1).to(logits.device),
        ignore_index=_IGNORED_LABEL,
        reduction="mean" if num_items is None else "sum",
    )
    return loss if num_items is None else loss / torch.as_tensor(num_items, device=loss.device)


def _kept(logits_to_keep: int | Tensor) -> slice | Tensor:
    """Returns the places whose logits are wanted: the last ones, all for 0, or those that are named."""
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep


def _refuse(function: str, arguments: Mapping[str, Any]) -> None:
    """Raises InvalidArgument if somebody asks for something that would be ignored."""
    asked = [name for name, value in arguments.items() if value is not None and value is not False]
    if asked:
        raise InvalidArgument(f"{function} of this model does not take {', '.join(sorted(asked))}; leave it out")
