"""`OffloadedKV(model)`: a Hugging Face decoder that answers from an offloaded context."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from wavekv.config import OffloadConfig
from wavekv.errors import CacheError, ConfigError, UnsupportedModelError
from wavekv.model_adapters import attention
from wavekv.model_adapters.cache import OffloadedCache
from wavekv.model_adapters.prefill import prefill
from wavekv.model_adapters.support import check_supported, switch_attention

_OTHER_INPUTS = ("inputs_embeds", "pixel_values", "input_features", "token_type_ids")


class OffloadedKV:
    """Wraps a model; everything it does not define itself is the model's.

    While wrapped, the model's attention is wavekv's: use the model through the wrapper, or call
    `unwrap()` (or leave the `with` block) to have it back as it was.
    """

    def __init__(
        self, model: PreTrainedModel, config: OffloadConfig | None = None, **overrides: Any
    ) -> None:
        """Wrap `model`; overrides are fields of `OffloadConfig`.

        Raises:
            UnsupportedModelError: the model cannot be wrapped, with the reason.
            ConfigError: a bad setting.
        """
        self.offload_config = (config or OffloadConfig()).override(**overrides)
        if isinstance(model, OffloadedKV):
            raise ConfigError("expected a Hugging Face model, got one that is wrapped already")
        check_supported(model)
        attention.register()
        self.model = model
        self._attention_before = switch_attention(model, attention.NAME)

    def __getattr__(self, name: str) -> Any:
        if name == "model":
            raise AttributeError(name)
        return getattr(self.model, name)

    def __enter__(self) -> OffloadedKV:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.unwrap()

    def unwrap(self) -> PreTrainedModel:
        """Give the model its own attention back and return it."""
        if self.model.config.get_text_config(decoder=True)._attn_implementation == attention.NAME:
            switch_attention(self.model, self._attention_before)
        return self.model

    def new_cache(self) -> OffloadedCache:
        """An empty cache for one conversation (or one batch of them)."""
        return OffloadedCache(self.model.config, self.offload_config)

    def __call__(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        """The model's forward. One new token is a decode step; several are attended to exactly."""
        if past_key_values is None and kwargs.get("use_cache", True):
            past_key_values = self.new_cache()
        if past_key_values is not None:
            self._check_cache(past_key_values)
            with past_key_values.restored_on_error():
                return self.model(*args, past_key_values=past_key_values, **kwargs)
        return self.model(*args, **kwargs)

    def prefill(
        self,
        input_ids: Tensor,
        cache: OffloadedCache,
        attention_mask: Tensor | None = None,
        *,
        progress: bool = False,
    ) -> Tensor:
        """Take `input_ids` [B, T] into the cache, exactly and in chunks.

        attention_mask: [B, cached + T], 0 where a token is padding. Returns the logits [B, V] after
        the last token. If it fails, the cache still answers for the chunks that were finished.

        Raises:
            CapacityError: the pages do not fit cpu_budget; nothing has changed then.
            CacheError: the cache is of another model, or shapes do not fit it.
        """
        self._check_cache(cache)
        options = {"progress": progress, "want_logits": True}
        logits = prefill(self.model, input_ids, cache, attention_mask, **options)
        assert logits is not None
        return logits

    def generate(
        self, inputs: Tensor | None = None, *, progress: bool = False, **kwargs: Any
    ) -> Any:
        """`model.generate` from an offloaded cache; takes everything it takes.

        The prompt up to its last token is prefilled in chunks first. Pass `past_key_values` (from
        `new_cache()`) with all token ids so far to go on with a conversation.
        """
        if kwargs.get("cache_implementation") is not None:
            raise ConfigError(
                "expected no cache_implementation: the cache is wavekv's own; "
                "pass past_key_values=model.new_cache() to keep it"
            )
        cache = kwargs.pop("past_key_values", None)
        cache = self.new_cache() if cache is None else cache
        self._check_cache(cache)
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if input_ids is not None and not any(
            kwargs.get(name) is not None for name in _OTHER_INPUTS
        ):
            self._prefill_prompt(input_ids, cache, kwargs, progress)
        return self.model.generate(input_ids, past_key_values=cache, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: continuous batching brings its own cache.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(
            "generate_batch (continuous batching) uses a paged cache of its own, which cannot be "
            "offloaded; use generate() with a batch, or unwrap() the model first"
        )

    def _prefill_prompt(
        self, input_ids: Tensor, cache: OffloadedCache, kwargs: dict[str, Any], progress: bool
    ) -> None:
        """Prefill all but the last token, then expand the cache as `generate` will the prompt."""
        seen = cache.get_seq_length()
        if seen >= input_ids.shape[1]:
            raise CacheError(
                f"the cache holds {seen} tokens, got a prompt of {input_ids.shape[1]}; pass all "
                "token ids so far and at least one new one, or a new cache"
            )
        mask = self._prompt_mask(input_ids, kwargs)
        new = input_ids[:, seen:-1]
        if new.shape[1]:
            options = {"progress": progress, "want_logits": False}
            prefill(self.model, new, cache, None if mask is None else mask[:, :-1], **options)
        generation: GenerationConfig = (
            kwargs.get("generation_config") or self.model.generation_config
        )
        copies = [
            kwargs.get(name) or getattr(generation, name, None) or 1
            for name in ("num_beams", "num_return_sequences")
        ]
        if max(copies) > 1:
            cache.batch_repeat_interleave(max(copies))

    def _prompt_mask(self, input_ids: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """The attention mask that `generate` would infer, where none is given."""
        mask: Tensor | None = kwargs.get("attention_mask")
        if mask is not None:
            return None if bool(mask.all()) else mask
        pad, end = (
            kwargs.get(name, getattr(self.model.generation_config, name, None))
            for name in ("pad_token_id", "eos_token_id")
        )
        ends = torch.as_tensor([] if end is None else end).flatten().tolist()
        if pad is None or pad in ends or not bool((input_ids == pad).any()):
            return None
        return (input_ids != pad).long()

    def _check_cache(self, cache: Any) -> None:
        if not isinstance(cache, OffloadedCache):
            raise CacheError(
                f"expected an OffloadedCache from new_cache(), got {type(cache).__name__}"
            )
        if cache.model_config is not self.model.config.get_text_config(decoder=True):
            raise CacheError(
                "this cache belongs to another model; expected one made by new_cache() of this one"
            )
