"""A cache layer of transformers whose tokens live in an offloaded context."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from wavekv.errors import CacheError, UnsupportedModelError
from wavekv.model_adapters.attention import tag
from wavekv.offload import LayerContext, Logits, OffloadRuntime


class OffloadedLayer(DynamicLayer):  # type: ignore[misc]
    """Gives back only the new keys and values, tagged; attention then comes here with its queries."""

    is_compileable = False

    def __init__(self, runtime: OffloadRuntime, model_config: PreTrainedConfig) -> None:
        super().__init__()
        self.runtime = runtime
        self.model_config = model_config
        self.context: LayerContext | None = None
        self._is_waiting = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the context that fits these states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.context = LayerContext(self.runtime, key_states, value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the new states as they are; `attend` takes them in."""
        if self._is_waiting:
            self._is_waiting = False
            raise CacheError(
                f"the keys given to this cache never reached wavekv's attention: expected a model "
                f"of type {self.model_config.model_type!r} wrapped in OffloadedKV that passes "
                "cached keys on unchanged; wrap the model, or leave this model type unwrapped"
            )
        if self.context is None:
            self.lazy_initialization(key_states, value_states)
        # a new tensor object: layers that share keys must not share the tag
        keys = key_states.view(key_states.shape)
        tag(keys, self)
        self._is_waiting = True
        return keys, value_states

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
        self._is_waiting = False
        self._check(module, query, keys, mask)
        assert self.context is not None
        valid = None if mask is None else mask[:, -keys.shape[2] :]
        return self.context.attend(query, keys, values, valid, logits, sink_logits)

    def get_seq_length(self) -> int:
        """Tokens held, padding included."""
        return 0 if self.context is None else self.context.num_tokens

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
            self.context.truncate(max(0, self.context.num_tokens + tokens_to_remove))

    def reset(self) -> None:
        """Forget all tokens."""
        if self.context is not None:
            self.context.settle()
        self.context, self.is_initialized, self._is_waiting = None, False, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the sequences by `beam_idx` [B] of them."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`, in that order."""
        if self.context is not None:
            self.context.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times."""
        if self.context is not None:
            batch = self.context.shape[0]
            self.context.select(torch.arange(batch).repeat_interleave(repeats))

    def roll_back(self, length: int) -> None:
        """Return to `length` tokens after a forward that failed midway."""
        self._is_waiting = False
        if self.context is not None and self.context.num_tokens > length:
            self.context.truncate(length)

    def offload(self) -> None:
        """Nothing to do: pages are on the host."""

    def prefetch(self) -> None:
        """Nothing to do: a step fetches the pages it selects."""

    def fork(self, runtime: OffloadRuntime) -> OffloadedLayer:
        """An independent layer with the same tokens; pages are shared."""
        copy = OffloadedLayer(runtime, self.model_config)
        if self.context is not None:
            copy.dtype, copy.device, copy.is_initialized = self.dtype, self.device, True
            copy.context = self.context.fork(runtime)
        return copy

    def _check(self, module: nn.Module, query: Tensor, keys: Tensor, mask: Tensor | None) -> None:
        if getattr(module, "config", self.model_config) is not self.model_config:
            raise CacheError(
                "this cache belongs to another model; expected one made by new_cache() of the "
                "model that uses it"
            )
        if query.requires_grad or keys.requires_grad:
            raise CacheError(
                "an offloaded cache does not carry gradients; run the model under torch.no_grad() "
                "or torch.inference_mode()"
            )
        if mask is not None and mask.ndim != 2:
            raise UnsupportedModelError(
                f"a full-attention layer came with a mask of shape {tuple(mask.shape)}; expected "
                "plain causal attention with padding [B, T] only (no image spans, no packed "
                "sequences, no custom 4-D masks)"
            )
        assert self.context is not None
        batch = self.context.shape[0]
        if keys.shape[0] != batch:
            raise CacheError(f"the cache holds {batch} sequences, got {keys.shape[0]}")
