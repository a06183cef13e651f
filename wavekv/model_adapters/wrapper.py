"""`OffloadedKV(model)`: a Hugging Face decoder that answers from an offloaded context."""

from __future__ import annotations

import inspect
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from wavekv.config import OffloadConfig
from wavekv.errors import CacheError, ConfigError, UnsupportedModelError
from wavekv.model_adapters import attention
from wavekv.model_adapters.cache import OffloadedCache
from wavekv.model_adapters.generation import generate, generation_settings
from wavekv.model_adapters.graph import captured_steps
from wavekv.model_adapters.prefill import check_shapes, positions, prefill
from wavekv.model_adapters.support import check_supported, switch_attention

_ATTENTION_BEFORE: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()
"""What each wrapped model attended with. Wrapping it again keeps the first."""
_OWN = ("model", "offload_config")


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
        if isinstance(model, OffloadedKV):
            raise ConfigError(
                "expected a Hugging Face model, got one that is wrapped already; for other "
                "settings wrap its .model"
            )
        self.offload_config = (config or OffloadConfig()).override(**overrides)
        check_supported(model)
        attention.register()
        self.model = model
        before = switch_attention(model, attention.NAME)
        if before != attention.NAME:
            _ATTENTION_BEFORE[model] = before

    def __getattr__(self, name: str) -> Any:
        if name in _OWN:
            raise AttributeError(name)
        return getattr(self.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            super().__setattr__(name, value)
        else:
            setattr(self.model, name, value)

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
        before = _ATTENTION_BEFORE.pop(self.model, None)
        if before is not None and self._is_wrapped():
            switch_attention(self.model, before)
        return self.model

    def new_cache(self) -> OffloadedCache:
        """An empty cache for one conversation (or one batch of them)."""
        cache = OffloadedCache(self.model.config, self.offload_config)
        cache.model = ref(self.model)
        return cache

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward. One new token is a decode step; several are attended to exactly.

        Without position_ids, positions count the valid tokens of attention_mask, as `generate()`
        counts them. If it fails, the cache holds what it held before.
        """
        self._check_wrapped()
        accepted = inspect.signature(self.model.forward).parameters
        kwargs |= dict(zip(accepted, args, strict=False))
        cache, use_cache = kwargs.pop("past_key_values", None), kwargs.get("use_cache")
        if cache is None and (self._uses_cache() if use_cache is None else use_cache):
            cache = self.new_cache()
        if cache is None:
            return self.model(**kwargs)
        self._check_cache(cache)
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if ids is not None and (mask is None or mask.ndim == 2):
            check_shapes(cache, ids, mask, cache.get_seq_length())
            if mask is not None and "position_ids" in accepted:
                kwargs.setdefault("position_ids", positions(mask, ids.shape[1]).to(ids.device))
        step = captured_steps(cache).run(self.model, kwargs | {"past_key_values": cache})
        if step is not None:
            return step
        with cache.restored_on_error():
            return self.model(past_key_values=cache, **kwargs)

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
            CapacityError: the pages do not fit cpu_budget, or all else, decode steps included, does
                not fit device_budget. Usually found before the first chunk; memory that others take
                meanwhile shows later, between chunks.
            CacheError: the cache is of another model, or shapes do not fit it.
        """
        self._check_wrapped()
        self._check_cache(cache)
        options = {"progress": progress, "want_logits": True}
        logits = prefill(self.model, input_ids, cache, attention_mask, **options)
        assert logits is not None
        return logits

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        progress: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`model.generate` from an offloaded cache; takes everything it takes.

        The prompt up to its last token is prefilled in chunks first; assisted decoding, and
        inputs other than token ids, take it in one forward. Pass `past_key_values` (from
        `new_cache()`) with all token ids so far to go on with a conversation. If it fails, that
        cache holds what was prefilled, and the same call may be repeated.

        Raises:
            CapacityError: as `prefill`.
            CacheError: the cache does not fit the prompt.
            ConfigError: a cache_implementation is asked for.
        """
        self._check_wrapped()
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
        settings = generation_settings(self.model, kwargs)
        cache = kwargs.pop("past_key_values", None)
        if settings.use_cache is False:
            if cache is not None:
                raise ConfigError("expected either past_key_values or use_cache=False, got both")
            return self.model.generate(inputs, **kwargs)
        is_kept = cache is not None
        cache = cache if is_kept else self.new_cache()
        self._check_cache(cache)
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        options = {"is_kept": is_kept, "progress": progress}
        return generate(self.model, input_ids, cache, settings, kwargs, **options)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: continuous batching brings its own cache.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(
            "generate_batch (continuous batching) uses a paged cache of its own, which cannot be "
            "offloaded; use generate() with a batch, or unwrap() the model first"
        )

    def _check_cache(self, cache: Any) -> None:
        if not isinstance(cache, OffloadedCache):
            raise CacheError(
                f"expected an OffloadedCache from new_cache(), got {type(cache).__name__}"
            )
        if cache.model_config is not self.model.config.get_text_config(decoder=True):
            raise CacheError(
                "this cache belongs to another model; expected one made by new_cache() of this one"
            )

    def _check_wrapped(self) -> None:
        if not self._is_wrapped():
            raise ConfigError(
                "expected a wrapped model, got one whose attention was switched back (unwrap(), a "
                "with block that has ended, or set_attn_implementation); wrap it again"
            )

    def _is_wrapped(self) -> bool:
        text = self.model.config.get_text_config(decoder=True)
        return bool(text._attn_implementation == attention.NAME)

    def _uses_cache(self) -> bool:
        return bool(getattr(self.model.config.get_text_config(decoder=True), "use_cache", True))
