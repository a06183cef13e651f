"""The cache of a wrapped model: full-attention layers are offloaded, all others stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from wavekv.config import DECODE_FIELDS, OffloadConfig
from wavekv.errors import CacheError, UnsupportedModelError
from wavekv.model_adapters.layer import OffloadedLayer
from wavekv.model_adapters.statistics import cache_statistics
from wavekv.offload import OffloadRuntime


class OffloadedCache(DynamicCache):  # type: ignore[misc]
    """One conversation (a batch of sequences) of one model. A `transformers` cache."""

    def __init__(self, model_config: PreTrainedConfig, config: OffloadConfig | None = None) -> None:
        """An empty cache.

        Raises:
            UnsupportedModelError: no layer of the model has plain full attention.
        """
        super().__init__(config=model_config)
        self.runtime = OffloadRuntime(config or OffloadConfig())
        self.model_config = model_config.get_text_config(decoder=True)
        for number, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[number] = OffloadedLayer(self.runtime, self.model_config)
        if not self.offloaded_layers:
            kinds = sorted({type(layer).__name__ for layer in self.layers})
            raise UnsupportedModelError(
                f"expected a model with full-attention layers, got {model_config.model_type!r} "
                f"with only {', '.join(kinds)}: there is nothing to offload"
            )

    @property
    def config(self) -> OffloadConfig:
        """The settings this cache was made with."""
        return self.runtime.config

    @property
    def offloaded_layers(self) -> list[OffloadedLayer]:
        """The layers whose tokens are offloaded."""
        return [layer for layer in self.layers if isinstance(layer, OffloadedLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and page statistics of the offloaded layers, in all tiers."""
        statistics = self.stats()
        return int(statistics["bytes_device"] + statistics["bytes_host"])

    def stats(self) -> dict[str, float | int]:
        """What the cache holds and what decoding did, as plain numbers (docs/architecture.md)."""
        self.settle()
        return cache_statistics(layer.context for layer in self.offloaded_layers)

    def settle(self) -> None:
        """Wait for pages that are under construction."""
        for layer in self.offloaded_layers:
            if layer.context is not None:
                layer.context.settle()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As in transformers. Called before any layer runs: host memory is reserved here, so that a
        full budget is an error before anything changed."""
        self.reserve(query_length)
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    def reserve(self, num_tokens: int) -> None:
        """Make room in host memory for what `num_tokens` more tokens will page out.

        Raises:
            CapacityError: they do not fit cpu_budget; nothing is allocated then.
        """
        wanted: dict[Any, int] = {}
        for layer in self.offloaded_layers:
            if layer.context is not None:
                batch, heads, _ = layer.context.shape
                paged = sum(layer.context.segments_after(num_tokens))
                arena = layer.context.paged.arena
                wanted[arena] = (
                    wanted.get(arena, 0) + batch * heads * paged // self.config.page_size
                )
        for arena, num_pages in wanted.items():
            arena.reserve(num_pages)

    def fork(self, **overrides: Any) -> OffloadedCache:
        """An independent cache with the same tokens. Pages are shared, so it is quick and small.

        overrides: decode settings to change: mode, budget, top_p, min_budget, tail_estimate.

        Raises:
            ConfigError: another setting, or a bad value.
        """
        config = self.config.override(DECODE_FIELDS, **overrides)
        fork: OffloadedCache = copy.copy(self)
        fork.runtime = self.runtime.fork(config)
        fork.layers = [
            layer.fork(fork.runtime) if isinstance(layer, OffloadedLayer) else copy.deepcopy(layer)
            for layer in self.layers
        ]
        return fork

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens (a negative number, as in transformers)."""
        if tokens_to_remove > 0:
            raise CacheError(
                f"crop expects minus the number of tokens to remove, got {tokens_to_remove}"
            )
        super().crop(tokens_to_remove)

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """If the body raises, the cache holds afterwards what it held before."""
        length = self.get_seq_length()
        others = {
            number: copy.deepcopy(layer)
            for number, layer in enumerate(self.layers)
            if not isinstance(layer, OffloadedLayer)
        }
        try:
            yield
        except BaseException:
            for number, layer in enumerate(self.layers):
                if isinstance(layer, OffloadedLayer):
                    layer.roll_back(length)
                else:
                    self.layers[number] = others[number]
            raise
