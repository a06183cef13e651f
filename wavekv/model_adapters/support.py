"""Which models can be wrapped: checked before anything changes, with the reason if not."""

from __future__ import annotations

from transformers import PreTrainedModel

from wavekv.errors import UnsupportedModelError
from wavekv.model_adapters.attention import NAME
from wavekv.model_adapters.cache import OffloadedCache


def check_supported(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError, saying why, if the model cannot be wrapped."""
    if not hasattr(model, "set_attn_implementation"):
        raise UnsupportedModelError(
            f"expected a Hugging Face model (PreTrainedModel), got {type(model).__name__}"
        )
    config = model.config
    kind = repr(config.model_type)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"expected a decoder-only model, got the encoder-decoder {kind}; its cross-attention "
            "cache is not supported"
        )
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"expected keys that are cached as attention sees them, got {kind} with multi-head "
            "latent attention (kv_lora_rank), which caches latents; MLA is not supported"
        )
    if getattr(text, "num_kv_shared_layers", None) or "reuse" in (
        getattr(text, "kv_sharing_modes", None) or ()
    ):
        raise UnsupportedModelError(
            f"expected a model whose every attention layer has keys of its own, got {kind}, whose "
            "last layers attend to keys of earlier ones; shared keys are not supported"
        )
    if not model._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"expected a model whose attention can be switched (transformers' attention "
            f"interface), got {type(model).__name__}, which computes attention itself; use a model "
            "class that ships with transformers"
        )
    if not getattr(model, "_supports_default_dynamic_cache", lambda: True)():
        raise UnsupportedModelError(
            f"expected a model that takes transformers' caches, got {kind}, which brings its own"
        )
    if not model.can_generate():
        raise UnsupportedModelError(
            f"expected a model with a language-model head, as AutoModelForCausalLM loads it, got "
            f"{type(model).__name__}"
        )
    OffloadedCache(config)


def switch_attention(model: PreTrainedModel, name: str) -> str:
    """Set the attention of the language model to `name`; return what it was.

    Raises:
        UnsupportedModelError: transformers did not switch it.
    """
    text = model.config.get_text_config(decoder=True)
    before: str = text._attn_implementation
    parts = [key for key in model.config.sub_configs if getattr(model.config, key) is text]
    model.set_attn_implementation({parts[0]: name} if parts else name)
    if text._attn_implementation != name:
        raise UnsupportedModelError(
            f"expected the attention of {type(model).__name__} to become {name!r}, it is still "
            f"{text._attn_implementation!r}; this model does not support {NAME}"
        )
    return before
