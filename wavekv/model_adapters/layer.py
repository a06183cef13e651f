"""A cache layer of transformers whose tokens live in an offloaded context."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from wavekv.errors import CacheError, UnsupportedModelError
from wavekv.model_adapters.attention import tag
from wavekv.model_adapters.padding import PaddingRecord
from wavekv.offload import LayerContext, Logits, OffloadRuntime


class OffloadedLayer(DynamicLayer):  # type: ignore[misc]
    """Gives back only the new keys and values, tagged; attention comes here with its queries."""

    is_compileable = False

    def __init__(
        self,
        runtime: OffloadRuntime,
        model_config: PreTrainedConfig,
        number: int,
        padding: PaddingRecord | None = None,
    ) -> None:
        """number: which of the offloaded layers this is. `padding`: the record that this layer
        keeps for its cache, if it is the one to."""
        super().__init__()
        self.number = number
        self.padding = padding
        self.runtime = runtime
        self.model_config = model_config
        self._context: LayerContext | None = None
        self._is_waiting = False

    @property
    def context(self) -> LayerContext | None:
        """The tokens of this layer; a decode engine that has them gives them back first."""
        self.runtime.reclaim()
        return self._context

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the context that fits these states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._context = LayerContext(self.runtime, key_states, value_states)
        self.is_initialized = True

    def take_over(self, context: LayerContext) -> None:
        """Hold the tokens of `context`."""
        keys = context.steady.keys.view
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._context = context

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the new states as they are; `attend` takes them in."""
        self.check_delivered()
        if self._context is None:
            self.lazy_initialization(key_states, value_states)
        # a new tensor object: layers that share keys must not share the tag
        keys = key_states.view(key_states.shape)
        tag(keys, self)
        self._is_waiting = True
        return keys, value_states

    def check_delivered(self) -> None:
        """Raise CacheError if keys were given but attention never came with them."""
        if self._is_waiting:
            self._is_waiting = False
            raise CacheError(
                f"the keys given to this cache never reached wavekv's attention: expected a model "
                f"of type {self.model_config.model_type!r} wrapped in OffloadedKV that passes "
                "cached keys on unchanged; wrap the model, or leave this model type unwrapped"
            )

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        logits: Logits,
        sink_logits: Tensor | None,
    ) -> Tensor:
        """Take in the new tokens and attend with their queries: [B, Hq, T, D] float32."""
        is_waiting, self._is_waiting = self._is_waiting, False
        if not is_waiting:
            raise UnsupportedModelError(
                f"{type(module).__name__} attends twice to keys that were cached once; models "
                "whose layers share keys are not supported"
            )
        engine = self.runtime.engine
        if engine is not None and engine.is_stepping:
            return engine.attend(self.number, query, keys, values, logits, sink_logits)
        self._check(module, query, keys, mask)
        assert self.context is not None
        if self.padding is not None:
            self.padding.take_in(mask, self.get_seq_length())
        valid = None if mask is None else mask[:, -keys.shape[2] :]
        return self.context.attend(query, keys, values, valid, logits, sink_logits)

    def get_seq_length(self) -> int:
        """Tokens held, padding included."""
        engine = self.runtime.engine
        if engine is not None:
            return engine.num_tokens
        return 0 if self._context is None else self._context.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(logical length with the queries, offset 0), wherever the tokens are."""
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise CacheError(
                f"crop expects minus the number of tokens to remove, got {tokens_to_remove}"
            )
        if tokens_to_remove and self.context is not None:
            self._truncate(max(0, self.context.num_tokens + tokens_to_remove))

    def reset(self) -> None:
        """Forget all tokens."""
        self._settle_anyway()
        self._context, self.is_initialized, self._is_waiting = None, False, False
        self.runtime.num_changes += 1
        if self.padding is not None:
            self.padding = PaddingRecord()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the sequences by `beam_idx` [B'] of them."""
        self.runtime.num_changes += 1
        if self.context is not None:
            self.context.select(beam_idx)
        if self.padding is not None:
            self.padding.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`, in that order."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times."""
        if self.context is not None:
            self.reorder_cache(torch.arange(self.context.shape[0]).repeat_interleave(repeats))

    def roll_back(self, length: int, batch: int) -> None:
        """Return to `length` tokens of `batch` sequences after a forward that failed midway.

        If there are more sequences now, each was repeated equally often.
        """
        self._is_waiting = False
        if self.context is None:
            return
        self._settle_anyway()
        if length == 0:
            self.reset()
            return
        held = self.context.shape[0]
        if held != batch:
            self.reorder_cache(torch.arange(0, held, held // batch))
        # the padding of new tokens is taken in before the tokens are
        self._truncate(min(length, self.context.num_tokens))

    def offload(self) -> None:
        """Nothing to do: pages are on the host."""

    def prefetch(self) -> None:
        """Nothing to do: a step fetches the pages it selects."""

    def fork(self, runtime: OffloadRuntime) -> OffloadedLayer:
        """An independent layer with the same tokens; pages are shared."""
        padding = None if self.padding is None else self.padding.copy()
        copy = OffloadedLayer(runtime, self.model_config, self.number, padding)
        if self.context is not None:
            copy.take_over(self.context.fork(runtime))
        return copy

    def _settle_anyway(self) -> None:
        """Wait for pages; where they cannot be built, their tokens stay in the local window."""
        if self.context is not None:
            with suppress(Exception):
                self.context.settle()

    def _truncate(self, length: int) -> None:
        assert self.context is not None
        self.runtime.num_changes += 1
        self.context.truncate(length)
        if self.padding is not None:
            self.padding.truncate(length)

    def _check(self, module: nn.Module, query: Tensor, keys: Tensor, mask: Tensor | None) -> None:
        if getattr(module, "config", self.model_config) is not self.model_config:
            raise CacheError(
                "this cache belongs to another model; expected one made by new_cache() of the "
                "model that uses it"
            )
        if query.requires_grad or keys.requires_grad:
            raise CacheError(
                "an offloaded cache does not carry gradients; run the model under torch.no_grad() "
                "or torch.inference_mode(), or without a cache (use_cache=False)"
            )
        if mask is not None and mask.ndim != 2:
            raise UnsupportedModelError(
                f"expected plain causal attention with padding [B, T] only, got a mask of shape "
                f"{tuple(mask.shape)}; image spans, packed sequences and custom 4-D masks need the "
                "model unwrapped"
            )
        assert self.context is not None
        batch = self.context.shape[0]
        if keys.shape[0] != batch:
            raise CacheError(
                f"expected {batch} sequences, as this cache holds, got {keys.shape[0]}; use a new "
                "cache, or select or repeat its sequences (batch_select_indices)"
            )
