"""Whether the parts of a loaded cache agree with each other and with what is said of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wavekv.errors import LayoutError
from wavekv.kvstore import KVLayout, SavedPages
from wavekv.model_adapters.layer import OffloadedLayer

if TYPE_CHECKING:
    from wavekv.model_adapters.cache import OffloadedCache


def expect_arena(
    layer: OffloadedLayer,
    kept: Mapping[str, Any],
    layouts: list[KVLayout],
    saved: Mapping[KVLayout, SavedPages],
) -> None:
    """Its pages are those of the arena that the context names, and none is what pads a file."""
    assert layer.context is not None
    paged, number = layer.context.paged, kept.get("arena")
    layout = paged.arena.layout
    if type(number) is not int or layouts[number : number + 1] != [layout]:
        raise LayoutError(f"arena must be the number of one with {layout}, got {number!r}")
    ids, num_pages = paged.page_ids.view, len(saved[layout].crc32)
    if ids.numel() and int(ids.max()) >= num_pages:
        raise LayoutError(f"row must be one of {num_pages} pages, got {int(ids.max())}")


def expect_size(cache: OffloadedCache, description: Mapping[str, Any]) -> None:
    """All layers hold as many tokens of as many sequences as the context says."""
    said = tuple(description.get(name) for name in ("num_sequences", "num_tokens"))
    for layer in cache.layers:
        found: tuple[Any, Any]
        if isinstance(layer, OffloadedLayer):
            assert layer.context is not None
            found = layer.context.shape[0], layer.context.num_tokens
        else:
            # recurrent states do not count
            found = cache.batch_size, getattr(layer, "cumulative_length", said[1])
        if found != said:
            raise LayoutError(
                f"(num_sequences, num_tokens) must be {found} by its layers, got {said}"
            )


def expect_padding(cache: OffloadedCache, valid: Tensor) -> None:
    """The record of padding is of these tokens, and all layers know of gaps."""
    is_known = valid.dim() == 2 and valid.dtype == torch.bool
    if not is_known or len(valid) != cache.batch_size or valid.shape[1] > cache.get_seq_length():
        raise LayoutError(
            f"padding must be bools of {cache.batch_size} sequences and at most "
            f"{cache.get_seq_length()} tokens, got {tuple(valid.shape)} {valid.dtype}"
        )
    contexts = [layer.context for layer in cache.offloaded_layers]
    if not all(context is not None and context.steady.has_gaps for context in contexts):
        raise LayoutError("has_gaps must be true of each layer where tokens are padding, got false")
