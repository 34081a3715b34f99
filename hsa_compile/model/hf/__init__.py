"""The bundled model for users of `transformers`: once this is imported, Auto classes read our directories.

Other models of `transformers` then have `attn_implementation="hsa"`.
"""

from hsa_compile.versions import missing

try:
    import transformers
except ModuleNotFoundError as error:
    raise missing("transformers", "the bridge to transformers") from error

from hsa_compile.model.hf.attention import NAME, hsa_attention_forward, hsa_mask
from hsa_compile.model.hf.cache import HSACache
from hsa_compile.model.hf.folder import HSABytesTokenizer, HSACompileConfig
from hsa_compile.model.hf.model import HSACompileForCausalLM
from hsa_compile.model.pretrained import MODEL_TYPE

__all__ = ["HSABytesTokenizer", "HSACache", "HSACompileConfig", "HSACompileForCausalLM", "register"]


def register() -> None:
    """Makes our classes known to `transformers`; importing this package does so, and once more does no harm."""
    transformers.AutoConfig.register(MODEL_TYPE, HSACompileConfig, exist_ok=True)
    transformers.AutoModelForCausalLM.register(HSACompileConfig, HSACompileForCausalLM, exist_ok=True)
    transformers.AutoTokenizer.register(HSACompileConfig, slow_tokenizer_class=HSABytesTokenizer, exist_ok=True)
    transformers.AttentionInterface.register(NAME, hsa_attention_forward)
    transformers.AttentionMaskInterface.register(NAME, hsa_mask)


register()
