"""Writing a cache as a saved context (`docs/format.md`)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from wavekv.config import DECODE_FIELDS, LAYOUT_FIELDS
from wavekv.errors import CacheError
from wavekv.kvstore import PageArena
from wavekv.model_adapters.fingerprint import model_fingerprint, tokenizer_digest
from wavekv.model_adapters.layer import OffloadedLayer
from wavekv.model_adapters.other_layers import store_other
from wavekv.offload.stored import store_layer
from wavekv.saved.manifest import Manifest
from wavekv.saved.writer import ContextWriter

if TYPE_CHECKING:
    from wavekv.model_adapters.cache import OffloadedCache


def save_cache(
    cache: OffloadedCache,
    path: str | Path,
    model: PreTrainedModel,
    *,
    tokenizer: Any | None,
    token_ids: Tensor | None,
    progress: bool,
) -> Manifest:
    """Write `cache`, of `model`; see `OffloadedCache.save`."""
    _expect_tokens(cache, token_ids)
    cache.settle()
    options = {"unit": "B", "unit_scale": True, "desc": "save", "disable": not progress}
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        tqdm(total=cache.nbytes, **options) as bar,
        ContextWriter(path, bar.update) as writer,
    ):
        description = {
            "num_tokens": cache.get_seq_length(),
            "num_sequences": cache.batch_size,
            "model": model_fingerprint(model),
            "tokenizer": None if tokenizer is None else tokenizer_digest(tokenizer),
            "settings": _settings(cache),
            "has_token_ids": token_ids is not None,
            "has_padding": cache.has_padding,
        }
        if token_ids is not None:
            writer.array("token_ids", token_ids.to(torch.int64))
        padding = cache.offloaded_layers[0].padding
        if padding is not None and padding.valid is not None:
            writer.array("padding", padding.valid)
        arenas = _Arenas(cache)
        description["layers"] = [
            _write_layer(writer, number, layer, arenas) for number, layer in enumerate(cache.layers)
        ]
        description["arenas"] = arenas.write(writer)
        return writer.commit(description)


def _expect_tokens(cache: OffloadedCache, token_ids: Tensor | None) -> None:
    size = cache.batch_size, cache.get_seq_length()
    if size[1] == 0:
        raise CacheError("expected a cache that holds tokens, got an empty one; prefill it first")
    if token_ids is not None and tuple(token_ids.shape) != size:
        raise CacheError(
            f"expected token_ids of the tokens that the cache holds, {size} = [sequences, tokens], "
            f"got {tuple(token_ids.shape)}"
        )


def _settings(cache: OffloadedCache) -> dict[str, Any]:
    """Those that say how pages are laid out, and how they were read."""
    settings = asdict(cache.config)
    return {name: settings[name] for name in (*LAYOUT_FIELDS, *DECODE_FIELDS)}


def _write_layer(writer: ContextWriter, number: int, layer: Any, arenas: _Arenas) -> dict[str, Any]:
    if not isinstance(layer, OffloadedLayer):
        values, tensors = store_other(layer)
        for name, tensor in tensors.items():
            writer.array(f"others/{number}/{name}", tensor)
        return {"other": values}
    assert layer.context is not None
    stored = store_layer(layer.context)
    rows = arenas.rows(layer.context.paged.arena, stored.pages["row"])
    for name, tensor in stored.arrays.items():
        writer.array(f"layers/{number}/{name}", tensor)
    writer.table(f"layer_{number}_pages", {**stored.pages, "row": rows})
    writer.table(f"layer_{number}_blocks", stored.blocks)
    return {"offloaded": stored.numbers, "arena": arenas.number(layer.context.paged.arena)}


class _Arenas:
    """The arenas of a cache, and which of their pages it uses: those become the rows of an array,
    in the order of layers, sequences, heads and tokens."""

    def __init__(self, cache: OffloadedCache) -> None:
        self._used: dict[PageArena, list[Tensor]] = {}
        for layer in cache.offloaded_layers:
            assert layer.context is not None
            paged = layer.context.paged
            self._used.setdefault(paged.arena, []).append(paged.page_ids.view.flatten())
        self._ids = {arena: _in_order(torch.cat(ids)) for arena, ids in self._used.items()}

    def number(self, arena: PageArena) -> int:
        """Which of the arrays holds the pages of an arena."""
        return list(self._ids).index(arena)

    def rows(self, arena: PageArena, ids: Tensor) -> Tensor:
        """The rows [n] of pages by their ids."""
        order = self._ids[arena].numpy()
        by_id = np.argsort(order)
        return torch.from_numpy(by_id[np.searchsorted(order, ids.numpy(), sorter=by_id)])

    def write(self, writer: ContextWriter) -> list[dict[str, Any]]:
        """Write all pages; a description of each array."""
        described = []
        for number, (arena, ids) in enumerate(self._ids.items()):
            layout = arena.layout

            def read(first: int, last: int, arena: PageArena = arena, ids: Tensor = ids) -> Tensor:
                return arena.gather(ids[first:last])

            shape = layout.stored_shape
            writer.pages(f"pages/{number}", len(ids), shape, layout.stored_dtype, read)
            described.append(
                {
                    "page_size": layout.page_size,
                    "head_dim": layout.head_dim,
                    "dtype": str(layout.dtype).removeprefix("torch."),
                    "host_dtype": layout.host_dtype,
                    "num_pages": len(ids),
                }
            )
        return described


def _in_order(ids: Tensor) -> Tensor:
    """Each id once, in the order in which it comes first."""
    _, first = np.unique(ids.numpy(), return_index=True)
    return ids[torch.from_numpy(np.sort(first))]
