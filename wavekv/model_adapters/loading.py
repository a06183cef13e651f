"""Reading a cache from a saved context: what is small is mapped or copied, pages stay in files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wavekv.config import LAYOUT_FIELDS, OffloadConfig
from wavekv.errors import ConfigError, ContextFormatError, LayoutError, UnsupportedModelError
from wavekv.kvstore import KVLayout, SavedPages
from wavekv.kvstore.layout import CODEC_BITS
from wavekv.model_adapters.agreement import expect_arena, expect_padding, expect_size
from wavekv.model_adapters.cache import OffloadedCache
from wavekv.model_adapters.fingerprint import check_model, check_tokenizer
from wavekv.model_adapters.layer import OffloadedLayer
from wavekv.model_adapters.other_layers import restore_other
from wavekv.offload.runtime import OffloadRuntime
from wavekv.offload.stored import STAY_ON_HOST, StoredLayer, restore_layer
from wavekv.saved.reader import ContextReader

_LAYERS_AHEAD = 8
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_cache(
    path: str | Path,
    model: PreTrainedModel,
    config: OffloadConfig,
    *,
    tokenizer: Any | None,
    verify: bool,
) -> OffloadedCache:
    """The saved context at `path` as a cache of `model`; see `OffloadedCache.load`."""
    _expect_one_device(model)
    with ContextReader.open(path) as reader:
        place, description = str(reader.path), reader.manifest.description
        with _said_of(place, "manifest.json"):
            check_model(_mapping(description, "model"), model, place)
            check_tokenizer(description.get("tokenizer"), tokenizer, place)
            config = _with_layout(config, _mapping(description, "settings"))
            arenas = _list(description, "arenas")
            layouts = _layouts(arenas)
        if verify:
            _expect_sound(reader)
        saved = {layouts[i]: _pages(reader, i, layouts[i], kept) for i, kept in enumerate(arenas)}
        cache = OffloadedCache(model.config, config)
        cache.model = ref(model)
        cache.runtime = OffloadRuntime(config, saved)
        with _said_of(place, "manifest.json"):
            layers = _pairs(cache.layers, _list(description, "layers"))
        device = model.device
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            _read(reader, len(layers), device) as read,
        ):
            for number, (layer, kept) in enumerate(layers):
                with _said_of(place, f"layer {number}"):
                    parts = read[number].result()
                    _load_layer(cache, layer, kept, parts, device)
                    if isinstance(layer, OffloadedLayer):
                        expect_arena(layer, kept, layouts, saved)
            with _said_of(place, "manifest.json"):
                expect_size(cache, description)
                _load_padding(reader, cache, description, model.device)
    return cache


class _LayerParts(NamedTuple):
    """What files hold of a layer, without its pages."""

    arrays: dict[str, Tensor]
    pages: dict[str, Tensor]
    blocks: dict[str, Tensor]


@contextmanager
def _read(
    reader: ContextReader, num_layers: int, device: torch.device
) -> Iterator[list[Future[_LayerParts]]]:
    """Files of layers are read, compared with their checksums and copied to the device by threads,
    some layers ahead of the one that is put together."""
    names: dict[str, list[str]] = {}
    for name in reader.arrays:
        folder, _, rest = name.partition("/")
        if folder in ("layers", "others"):
            names.setdefault(rest.partition("/")[0], []).append(name)
    tables = set(reader.tables)

    def read(number: int) -> _LayerParts:
        arrays = names.get(str(number), [])
        kinds = [f"layer_{number}_{kind}" for kind in ("pages", "blocks")]
        reader.check([*arrays, *(kind for kind in kinds if kind in tables)])
        moved = {name.split("/", 2)[2]: reader.array(name).to(device) for name in arrays}
        pages, blocks = (reader.table(kind) if kind in tables else {} for kind in kinds)
        for name, part in pages.items():
            pages[name] = part if name in STAY_ON_HOST else part.to(device)
        return _LayerParts(moved, pages, {name: part.to(device) for name, part in blocks.items()})

    with ThreadPoolExecutor(_LAYERS_AHEAD, "wavekv-load") as pool:
        try:
            yield [pool.submit(read, number) for number in range(num_layers)]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _load_layer(
    cache: OffloadedCache, layer: Any, kept: Any, parts: _LayerParts, device: torch.device
) -> None:
    if not isinstance(layer, OffloadedLayer):
        restore_other(layer, _mapping(kept, "other"), parts.arrays, device)
        return
    stored = StoredLayer(dict(_mapping(kept, "offloaded")), *parts)
    layer.runtime = cache.runtime
    layer.take_over(restore_layer(cache.runtime, stored, device))


def _load_padding(
    reader: ContextReader,
    cache: OffloadedCache,
    description: Mapping[str, Any],
    device: torch.device,
) -> None:
    has_padding = description.get("has_padding")
    if has_padding is not ("padding" in reader.arrays):
        raise LayoutError(f"has_padding must say if there is an array padding, got {has_padding!r}")
    if has_padding:
        valid = reader.array("padding")
        expect_padding(cache, valid)
        padding = cache.offloaded_layers[0].padding
        assert padding is not None
        padding.valid = valid.to(device)


def _pages(
    reader: ContextReader, number: int, layout: KVLayout, kept: Mapping[str, Any]
) -> SavedPages:
    pages = reader.pages(f"pages/{number}")
    if kept.get("num_pages") != pages.num_pages:
        raise ContextFormatError(
            f"expected {reader.path}/manifest.json with num_pages={pages.num_pages} of arena "
            f"{number}, got {kept.get('num_pages')!r}; it was not written by save()"
        )
    if (pages.stored_shape, pages.dtype) != (layout.stored_shape, layout.stored_dtype):
        raise ContextFormatError(
            f"expected pages/{number} of {reader.path} as {layout.stored_shape} "
            f"{layout.stored_dtype}, got {pages.stored_shape} {pages.dtype}"
        )
    return SavedPages(
        names=[str(reader.path / name) for name in pages.files],
        rows_per_file=pages.rows_per_file,
        crc32=pages.crc32.numpy(),
        descriptors=pages.open(),
        files=pages.map(),
    )


def _with_layout(config: OffloadConfig, saved: Mapping[str, Any]) -> OffloadConfig:
    """`config`, with what says how the saved pages are laid out."""
    layout = {name: saved[name] for name in LAYOUT_FIELDS}
    return config.override(**layout)


def _layouts(arenas: list[Any]) -> list[KVLayout]:
    layouts = [_layout(arena) for arena in arenas]
    if len(set(layouts)) != len(layouts):
        raise LayoutError(f"arenas must each have another layout, got {layouts}")
    return layouts


def _layout(arena: Mapping[str, Any]) -> KVLayout:
    sizes = arena["page_size"], arena["head_dim"]
    if any(type(size) is not int or size < 1 for size in sizes):
        raise LayoutError(f"page_size and head_dim must be sizes, got {sizes}")
    if arena["host_dtype"] not in ("model", *CODEC_BITS):
        raise LayoutError(f"host_dtype must be one of {list(CODEC_BITS)}, got {arena!r}")
    return KVLayout(*sizes, _DTYPES[arena["dtype"]], arena["host_dtype"])


def _expect_one_device(model: PreTrainedModel) -> None:
    devices = sorted({str(weight.device) for weight in model.parameters() if not weight.is_meta})
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"expected a model on one device to load a context for, got one on {devices}; prefill "
            "again where it is spread over several"
        )


def _expect_sound(reader: ContextReader) -> None:
    problems = reader.verify()
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ContextFormatError(problems[0] + more)


def _mapping(holder: Any, name: str) -> Mapping[str, Any]:
    part = holder.get(name) if isinstance(holder, Mapping) else None
    if not isinstance(part, Mapping):
        raise LayoutError(f"{name} must be an object, got {part!r}")
    return part


def _list(holder: Mapping[str, Any], name: str) -> list[Any]:
    part = holder.get(name)
    if not isinstance(part, list):
        raise LayoutError(f"{name} must be a list, got {part!r}")
    return part


def _pairs(layers: list[Any], kept: list[Any]) -> list[tuple[Any, Any]]:
    if len(layers) != len(kept):
        raise LayoutError(f"layers must be {len(layers)}, got {len(kept)}")
    return list(zip(layers, kept, strict=True))


@contextmanager
def _said_of(place: str, part: str) -> Iterator[None]:
    """Say where a part is that does not fit."""
    try:
        yield
    except (LayoutError, ConfigError, LookupError, TypeError, AttributeError) as error:
        raise ContextFormatError(
            f"expected {place} with a {part} that fits itself, got: {error}; it was not written by "
            "save(), or for another version"
        ) from error
