"""Which models can be wrapped: checked before anything changes, with the reason if not."""

from __future__ import annotations

from transformers import PreTrainedModel

from wavekv.errors import UnsupportedModelError
from wavekv.model_adapters.attention import NAME
from wavekv.model_adapters.cache import OffloadedCache


def check_supported(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError, saying why, if the model cannot be wrapped."""
    config = model.config
    kind = repr(config.model_type)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"expected a decoder-only model, got the encoder-decoder {kind}; its cross-attention "
            "cache is not supported"
        )
    if getattr(config.get_text_config(decoder=True), "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"expected keys that are cached as attention sees them, got {kind} with multi-head "
            "latent attention (kv_lora_rank), which caches latents; MLA is not supported"
        )
    if not model._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"expected a model whose attention can be switched (transformers' attention "
            f"interface), got {type(model).__name__}, which computes attention itself; use a model "
            "class that ships with transformers"
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
