"""`generate()` from an offloaded cache: the prompt in chunks, then transformers goes on."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from wavekv.errors import CacheError, ConfigError
from wavekv.model_adapters.cache import OffloadedCache
from wavekv.model_adapters.graph import capturing_view
from wavekv.model_adapters.prefill import check_shapes, prefill

# what `generate` takes beside inputs of the forward
_NO_INPUTS = {
    *inspect.signature(GenerationMixin.generate).parameters,
    *("attention_mask", "use_cache", "logits_to_keep", "tokenizer", "assistant_tokenizer"),
    *("output_attentions", "output_hidden_states"),
}


def generation_settings(model: PreTrainedModel, kwargs: dict[str, Any]) -> GenerationConfig:
    """What `generate(**kwargs)` will go by: keywords before a generation_config before defaults.

    Raises:
        ConfigError: a cache_implementation is asked for.
    """
    given = {"generation_config": None} | kwargs
    settings: GenerationConfig = model._prepare_generation_config(**given)[0]
    wanted = settings.cache_implementation
    if wanted is not None:
        if wanted != model.generation_config.cache_implementation:
            raise ConfigError(
                f"expected no cache_implementation, got {wanted!r}: the cache is wavekv's own; "
                "pass past_key_values=model.new_cache() to keep it"
            )
        # a default of the checkpoint, not a wish
        kwargs["cache_implementation"] = None
    return settings


def generate(
    model: PreTrainedModel,
    input_ids: Tensor | None,
    cache: OffloadedCache,
    settings: GenerationConfig,
    kwargs: dict[str, Any],
    *,
    is_kept: bool,
    progress: bool,
) -> Any:
    """Prefill all but the last token, then let transformers generate.

    is_kept: the caller has the cache too, so an error must leave it in order.
    """
    is_assisted = (
        settings.get_generation_mode(kwargs.get("assistant_model"))
        == GenerationMode.ASSISTED_GENERATION
    )
    has_other_inputs = any(
        value is not None and name not in _NO_INPUTS and not hasattr(settings, name)
        for name, value in kwargs.items()
    )
    if is_assisted:
        _check_unused(cache)
    elif input_ids is not None and not has_other_inputs:
        _check_new(cache, input_ids, kwargs.get("attention_mask"))
        mask = _prompt_mask(input_ids, settings, kwargs)
        if mask is not None:
            kwargs["attention_mask"] = mask
        # all but the last token, as far as the cache does not hold it
        new = input_ids[:, cache.get_seq_length() : -1]
        if new.shape[1]:
            options = {"progress": progress, "want_logits": False}
            prefill(model, new, cache, None if mask is None else mask[:, :-1], **options)
        if settings.prefill_chunk_size is not None:
            # only the last token is left to prefill
            kwargs["prefill_chunk_size"] = None
    copies = max(settings.num_beams or 1, settings.num_return_sequences or 1)
    with cache.restored_on_error() if is_kept else nullcontext():
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        runner = capturing_view(model, cache)
        out = runner.generate(input_ids, past_key_values=cache, **kwargs)
    cache.stop_recording()
    return out


def _check_new(cache: OffloadedCache, input_ids: Tensor, mask: Tensor | None) -> None:
    seen = cache.get_seq_length()
    if seen >= input_ids.shape[1]:
        raise CacheError(
            f"expected a prompt longer than the {seen} tokens of this cache, got "
            f"{input_ids.shape[1]}; pass all token ids so far and at least one new one, or a new "
            "cache"
        )
    check_shapes(cache, input_ids[:, seen:], mask, seen)


def _prompt_mask(
    input_ids: Tensor, settings: GenerationConfig, kwargs: dict[str, Any]
) -> Tensor | None:
    """The attention mask of a prompt, inferred as transformers would where none is given."""
    mask: Tensor | None = kwargs.get("attention_mask")
    if mask is None and settings.pad_token_id is not None:
        ends = settings.eos_token_id
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        if settings.pad_token_id not in ends:
            mask = (input_ids != settings.pad_token_id).long()
    return None if mask is None or bool(mask.all()) else mask


def _check_unused(cache: OffloadedCache) -> None:
    if cache.get_seq_length():
        raise CacheError(
            f"expected an empty cache for assisted decoding (prompt lookup, assistant models), got "
            f"{cache.get_seq_length()} tokens: transformers would feed it the whole prompt again; "
            "pass a new cache, or leave the assistant out"
        )
