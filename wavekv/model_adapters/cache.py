"""The cache of a wrapped model: full-attention layers are offloaded, others stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from wavekv.config import DECODE_FIELDS, OffloadConfig
from wavekv.errors import CacheError, UnsupportedModelError
from wavekv.model_adapters.attention import NAME
from wavekv.model_adapters.layer import OffloadedLayer
from wavekv.model_adapters.padding import PaddingRecord
from wavekv.model_adapters.snapshot import restore, snapshot
from wavekv.model_adapters.statistics import cache_statistics
from wavekv.offload import OffloadRuntime
from wavekv.offload.interrupts import uninterrupted
from wavekv.saved.context import SavedContext

if TYPE_CHECKING:
    from wavekv.model_adapters.graph import CapturedSteps


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
        self.steps: CapturedSteps | None = None
        """How decode steps run; a wrapper sets it."""
        self.model: ref[PreTrainedModel] | None = None
        """The model that it is of; a wrapper sets it. Weak: no reason to keep weights."""
        for number, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                # one record for all layers: they see the same tokens
                count = len(self.offloaded_layers)
                padding = None if count else PaddingRecord()
                self.layers[number] = OffloadedLayer(
                    self.runtime, self.model_config, count, padding
                )
        if not self.offloaded_layers:
            kinds = sorted({type(layer).__name__ for layer in self.layers})
            raise UnsupportedModelError(
                f"expected a model with full-attention layers, got {model_config.model_type!r} "
                f"with only {', '.join(kinds)}: there is nothing to offload"
            )

    def save(
        self,
        path: str | Path,
        *,
        tokenizer: Any | None = None,
        token_ids: Tensor | None = None,
        progress: bool = False,
    ) -> SavedContext:
        """Write all tokens as a saved context: a directory at `path`, new or a saved context that
        this one replaces. Until it is complete and on the disk, `path` is what it was.

        tokenizer: for `load` to compare. token_ids: [B, T] of the tokens held, for whoever loads
        the context.

        Raises:
            CacheError: the cache is empty, its model is gone, or token_ids are not of its tokens.
            LockedError: another process is writing to `path`.
            ContextFormatError: something else is at `path`, or a page of the context that this
                cache was loaded from is damaged.
            CapacityError: the disk has no room.
        """
        from wavekv.model_adapters.saving import save_cache

        model = None if self.model is None else self.model()
        if model is None:
            raise CacheError(
                "expected a cache from new_cache() or load() of a model that is there still, got "
                "one without its model; keep the model until the cache is saved"
            )
        save_cache(self, path, model, tokenizer=tokenizer, token_ids=token_ids, progress=progress)
        return SavedContext.open(path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: Any,
        *,
        tokenizer: Any | None = None,
        verify: bool = False,
    ) -> OffloadedCache:
        """A cache with the tokens of a saved context. Pages are not read before they are wanted,
        and each is checked when it is; the saved context is never written to.

        model: wrapped (`OffloadedKV`), whose settings it takes, but for those of the layout of
        pages. tokenizer: to be the one that the context was saved with. verify: read and check all
        files first.

        Raises:
            FileNotFoundError: nothing is at `path`.
            ContextFormatError: it is not a saved context, is damaged, or of a newer version.
            ContextMismatchError: it is of another model or tokenizer; the message names the field.
            UnsupportedModelError: the model is spread over several devices.
        """
        from wavekv.model_adapters.loading import load_cache

        config = getattr(model, "offload_config", None)
        if config is None:
            raise CacheError(
                f"expected a wrapped model, OffloadedKV(model), got {type(model).__name__}"
            )
        return load_cache(path, model.model, config, tokenizer=tokenizer, verify=verify)

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
        return int(statistics["bytes_device"] + statistics["bytes_pages"])

    def stats(self) -> dict[str, float | int]:
        """What the cache holds and what decoding did, as plain numbers.

        tokens, sequences (of one layer), pages (of all); decode_steps that retrieved;
        retrieved_fraction and tail_mass (means over those); bytes_device (steady zone and index),
        bytes_pages (all), bytes_host and bytes_disk (pages in memory, in files, or in both);
        bytes_to_host, bytes_to_device, bytes_to_disk, bytes_from_disk (moved so far);
        device_hit_rate, host_hit_rate; late_pages (chosen, not waited for, and estimated).
        """
        self.settle()
        return cache_statistics(layer.context for layer in self.offloaded_layers)

    def settle(self) -> None:
        """Wait for pages that are under construction."""
        for layer in self.offloaded_layers:
            if layer.context is not None:
                layer.context.settle()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As in transformers, but an offloaded layer gives back the new states only.

        Raises:
            CacheError: attention would not see the other tokens.
        """
        if self.model_config._attn_implementation != NAME:
            raise CacheError(
                f"expected the model of this cache to attend with {NAME!r}, it attends with "
                f"{self.model_config._attn_implementation!r}; wrap it in OffloadedKV (again)"
            )
        self._check_delivered()
        states: tuple[Tensor, Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        return states

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As in transformers. Called before any layer runs: host memory is reserved here, so that a
        full budget is an error before anything changed."""
        self._check_delivered()
        self.reserve(query_length)
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    def _check_delivered(self) -> None:
        for layer in self.offloaded_layers:
            layer.check_delivered()

    def reserve(self, num_tokens: int) -> None:
        """Make room in host memory for what `num_tokens` more tokens will page out.

        Raises:
            CapacityError: they do not fit cpu_budget; nothing is allocated then.
        """
        engine = self.runtime.engine
        if engine is not None and engine.is_stepping:
            # it sees to that itself
            return
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
        """An independent cache with the same tokens. Pages are shared; the index and the steady
        zone are copied.

        overrides: decode settings to change: mode, budget, top_p, min_budget, refine,
        tail_estimate.

        Raises:
            ConfigError: another setting, or a bad value.
        """
        config = self.config.override(DECODE_FIELDS, **overrides)
        fork: OffloadedCache = copy.copy(self)
        fork.runtime, fork.steps = self.runtime.fork(config), None
        fork.layers = [
            layer.fork(fork.runtime) if isinstance(layer, OffloadedLayer) else copy.deepcopy(layer)
            for layer in self.layers
        ]
        return fork

    @property
    def batch_size(self) -> int:
        """Sequences held, -1 while empty."""
        if self.runtime.engine is not None:
            return self.runtime.engine.shape.batch
        context = self.offloaded_layers[0].context
        return -1 if context is None else context.shape[0]

    @property
    def has_padding(self) -> bool:
        """Whether some of the tokens held are padding."""
        padding = self.offloaded_layers[0].padding
        return padding is not None and not padding.is_empty

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadedCache:
        """A fork: what code that copies caches for a shared prefix means."""
        return self.fork()

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the last `-tokens_to_remove` tokens (a negative number, as in transformers).

        Raises:
            CacheError: a positive number, or a layer that is not offloaded cannot go back (sliding
                windows that have moved on, recurrent states); nothing has changed then.
        """
        # assisted decoding gives a tensor; layers would count in it, and whoever adds to the length
        # that they tell would change it
        try:
            tokens_to_remove = index(tokens_to_remove)
        except TypeError:
            raise CacheError(
                f"crop expects a whole number of tokens to remove, got {tokens_to_remove}"
            ) from None
        if tokens_to_remove > 0:
            raise CacheError(
                f"crop expects minus the number of tokens to remove, got {tokens_to_remove}"
            )
        if self.get_seq_length() == 0:
            return
        others = self._other_layers()
        states = [snapshot(layer) for layer in others]
        try:
            for layer in others:
                if tokens_to_remove and not layer.is_croppable:
                    raise RuntimeError("recurrent states hold all tokens in one")
                if tokens_to_remove or getattr(layer, "record_past", False):
                    layer.crop(tokens_to_remove)
        except Exception as error:
            for layer, state in zip(others, states, strict=True):
                restore(layer, state)
            raise CacheError(
                f"expected layers that can forget tokens, got {type(layer).__name__}, which no "
                "longer has what it needs to go back; fork() before the tokens come instead"
            ) from error
        for layer in self.offloaded_layers:
            layer.crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget all tokens; the cache is as new."""
        fresh = DynamicCache(config=self.model_config)
        for number, layer in enumerate(self.layers):
            if isinstance(layer, OffloadedLayer):
                layer.reset()
            else:
                # the layers' own reset leaves zeros behind in some versions
                self.layers[number] = fresh.layers[number]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times."""
        if self.batch_size > 0:
            self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`, in that order."""
        if self.batch_size > 0:
            self.reorder_cache(torch.arange(self.batch_size)[indices.cpu()])

    def stop_recording(self) -> None:
        """Let windows and convolutions drop what only a `crop` needs (assisted decoding)."""
        for layer in self._other_layers():
            if hasattr(layer, "record_past"):
                layer.record_past = False

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """If the body raises, the cache holds afterwards what it held before.

        The body may add tokens and repeat or reorder sequences, but not mix those that differ.
        """
        length, batch = self.get_seq_length(), self.batch_size
        others = self._other_layers()
        states = [snapshot(layer) for layer in others]
        try:
            yield
            self._check_delivered()
        except BaseException:
            with uninterrupted():
                for layer, state in zip(others, states, strict=True):
                    restore(layer, state)
                for layer in self.offloaded_layers:
                    layer.roll_back(length, batch)
            raise

    def _other_layers(self) -> list[Any]:
        return [layer for layer in self.layers if not isinstance(layer, OffloadedLayer)]
