"""A layer's context as plain arrays and numbers, and back: what a saved context keeps of it, but
for the pages themselves."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wavekv.errors import LayoutError
from wavekv.growing import GrowingTensor
from wavekv.kernels.page_index import PageIndex, pages_of_parts
from wavekv.offload.context import LayerContext
from wavekv.offload.runtime import OffloadRuntime
from wavekv.offload.steady import SteadyZone

_STEADY = ("keys", "values", "valid")
_FLAGS = ("has_gaps", "is_ragged")
STAY_ON_HOST = ("row", "token_ids", "counts")
"""Of the columns of pages: those that are looked at there."""


class StoredLayer(NamedTuple):
    """What is kept of a layer; B, Hkv, D, N, P and K as everywhere."""

    numbers: dict[str, Any]
    """Plain values that JSON holds."""
    arrays: dict[str, Tensor]
    """keys, values [B, Hkv, A + L, D], valid [B, A + L], sink_positions [B, A] of the steady zone;
    scatter [B, Hkv, spans, 2, D, D]."""
    pages: dict[str, Tensor]
    """[B * Hkv * N, ...]: row (of a page in its arena), token_ids [P], and what the index has of
    each page."""
    blocks: dict[str, Tensor]
    """[B * Hkv * N / K, ...]: what the index has of each block of pages."""


def store_layer(context: LayerContext) -> StoredLayer:
    """What to keep of a context. Views of what it holds: valid until it changes next."""
    context.settle()
    steady, paged = context.steady, context.paged
    B, H, D = context.shape
    numbers = {
        **{"sequences": B, "kv_heads": H, "head_dim": D, "start": steady.start},
        **{name: getattr(steady, name) for name in _FLAGS},
        "dtype": str(steady.keys.view.dtype).removeprefix("torch."),
        "num_pages": paged.num_pages,
        "segments": [list(segment) for segment in paged.segments],
    }
    arrays = {name: getattr(steady, name).view for name in _STEADY}
    arrays |= {"sink_positions": steady.sink_positions, "scatter": paged.scatter.spans.view}
    pages = {"row": paged.page_ids.view, "token_ids": paged.token_ids.view}
    blocks: dict[str, Tensor] = {}
    for name, part, every in _index_parts(paged.index.view, paged.index.block_pages):
        (pages if every == 1 else blocks)[name] = part
    flat = ({name: x.flatten(0, 2) for name, x in group.items()} for group in (pages, blocks))
    return StoredLayer(numbers, arrays, *flat)


def restore_layer(
    runtime: OffloadRuntime, stored: StoredLayer, device: torch.device
) -> LayerContext:
    """The context that was stored, over the arena of `runtime`, whose pages have the ids `row`.

    Raises:
        LayoutError: parts that do not fit each other or the settings of the runtime.
    """
    numbers = stored.numbers
    B, H, D, N = (
        _count(numbers, name) for name in ("sequences", "kv_heads", "head_dim", "num_pages")
    )
    keys = stored.arrays["keys"]
    sinks, held = stored.arrays["sink_positions"].shape[-1], stored.arrays["valid"].shape[-1]
    # before anything is made in these sizes
    _expect(stored.arrays, "keys", (B, H, max(sinks, held), D), keys.dtype)
    if numbers.get("dtype") != str(keys.dtype).removeprefix("torch."):
        raise LayoutError(f"dtype must be that of keys, {keys.dtype}, got {numbers.get('dtype')!r}")
    like = torch.empty(B, H, 0, D, dtype=keys.dtype, device=device)
    context = LayerContext(runtime, like, like)
    _restore_steady(context.steady, stored, (B, H, sinks, held, D))
    _restore_pages(context, stored, (B, H, N))
    return context


def _restore_steady(
    steady: SteadyZone, stored: StoredLayer, size: tuple[int, int, int, int, int]
) -> None:
    B, H, sinks, held, D = size
    device = steady.keys.view.device
    shapes = {"keys": (B, H, held, D), "values": (B, H, held, D), "valid": (B, held)}
    for name, dim in zip(_STEADY, (2, 2, 1), strict=True):
        part = _expect(stored.arrays, name, shapes[name], getattr(steady, name).view.dtype)
        setattr(steady, name, GrowingTensor.holding(part.to(device), dim=dim))
    positions = _expect(stored.arrays, "sink_positions", (B, sinks), torch.int64)
    steady.start = _count(stored.numbers, "start")
    # a sequence with long padding may have sinks that are still among the local tokens
    _expect_positions("sink_positions", positions, steady.start + held - sinks)
    steady.sink_positions = positions.to(device)
    for name in _FLAGS:
        setattr(steady, name, _flag(stored.numbers, name))
    _expect_flags(steady)


def _expect_flags(steady: SteadyZone) -> None:
    """Slots without a token are there only if the flags say so."""
    empty, start, slots = ~steady.valid.view, steady.start, steady.num_sink_slots
    if not steady.has_gaps:
        # but for those that sinks left behind; the last column is for sinks that left none
        left = torch.zeros(len(empty), empty.shape[1] + 1, dtype=torch.bool, device=empty.device)
        positions = steady.sink_positions
        at = torch.where(positions >= start, positions - start + slots, empty.shape[1])
        unexplained = empty & ~left.scatter_(1, at, True)[:, :-1]
        if bool(unexplained.any()):
            raise LayoutError("has_gaps must be true where valid has gaps, got false")
    if not steady.is_ragged and bool(empty.any()):
        raise LayoutError("is_ragged must be true where valid is not, got false")
    if steady.has_gaps and not steady.is_ragged:
        raise LayoutError("is_ragged must be true where has_gaps is, got false")


def _restore_pages(context: LayerContext, stored: StoredLayer, size: tuple[int, int, int]) -> None:
    paged, device = context.paged, context.steady.keys.view.device
    (B, H, N), (_, _, D) = size, context.shape
    K, P = paged.index.block_pages, paged.arena.layout.page_size
    paged.segments = _segments(stored.numbers, N, K, P)
    counts = _expect(stored.pages, "counts", (B * H * N,), torch.uint8)
    if counts.numel() and int(counts.max()) > P:
        raise LayoutError(f"counts must be at most page_size={P}, got {int(counts.max())}")
    spans = -(-N // paged.scatter.span_pages)
    scatter = _expect(stored.arrays, "scatter", (B, H, spans, 2, D, D), torch.bfloat16)
    token_ids = _expect(stored.pages, "token_ids", (B * H * N, P), torch.int32)
    _expect_positions("token_ids", token_ids, context.steady.start)
    parts = []
    for name, empty, every in _index_parts(paged.index.view, K):
        rows = stored.pages if every == 1 else stored.blocks
        shape = B * H * (N // every), *empty.shape[3:]
        part = _expect(rows, name, shape, empty.dtype).view(B, H, N // every, *empty.shape[3:])
        parts.append(GrowingTensor.holding(part.to(device), dim=2))
    ids = _expect(stored.pages, "row", (B * H * N,), torch.int64).view(size)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < paged.arena.num_pages:
        raise LayoutError(
            f"row must be one of {paged.arena.num_pages} pages, got {int(ids.min())} to "
            f"{int(ids.max())}"
        )
    paged.index.parts = tuple(parts)
    paged.scatter.spans = GrowingTensor.holding(scatter.to(device), dim=2)
    paged.counts = GrowingTensor.holding(counts.view(size).to(torch.int32), dim=2)
    paged.token_ids = GrowingTensor.holding(token_ids.view(*size, P), dim=2)
    # last: from here on the zone gives the pages back when it goes
    paged.arena.retain(ids)
    paged.page_ids = GrowingTensor.holding(ids, dim=2)


def _index_parts(index: PageIndex, block_pages: int) -> list[tuple[str, Tensor, int]]:
    """Name, tensor, and how many pages share an entry."""
    every = pages_of_parts(block_pages)
    return list(zip(index._fields, index, every, strict=True))


def _segments(
    numbers: Mapping[str, Any], num_pages: int, block: int, page_size: int
) -> list[tuple[int, int]]:
    """(end position, end page) of each, ascending, in whole blocks, up to the last page."""
    found, start = numbers.get("segments"), numbers.get("start")
    is_list = isinstance(found, list) and all(_is_segment(x, block, page_size) for x in found)
    segments = [(end, page) for end, page in found] if is_list and found else []
    ends = [(0, 0), *segments]
    is_rising = all(earlier < later for (_, earlier), (_, later) in pairwise(ends))
    if not is_list or not is_rising or ends[-1] != (start, num_pages):
        last = found[-3:] if isinstance(found, list) else found
        raise LayoutError(
            f"segments must rise to start={start!r} and num_pages={num_pages} in whole blocks of "
            f"{block} pages of {page_size} tokens, got {last!r}"
        )
    return segments


def _is_segment(found: Any, block: int, page_size: int) -> bool:
    """Whether it is [end position, end page], whole blocks from the start on."""
    if not isinstance(found, list) or [type(x) for x in found] != [int, int]:
        return False
    end, page = found
    return bool(page % block == 0 and end == page * page_size)


def _expect_positions(name: str, positions: Tensor, end: int) -> None:
    """Those of tokens before `end`, or -1 for none."""
    if not positions.numel():
        return
    least, most = (int(x) for x in positions.aminmax())
    if least < -1 or most >= end:
        raise LayoutError(f"{name} must be -1 or below {end}, got {least} to {most}")


def _flag(numbers: Mapping[str, Any], name: str) -> bool:
    flag = numbers.get(name)
    if not isinstance(flag, bool):
        raise LayoutError(f"{name} must be true or false, got {flag!r}")
    return flag


def _count(numbers: Mapping[str, Any], name: str) -> int:
    number = numbers.get(name)
    if type(number) is not int or number < 0:
        raise LayoutError(f"{name} must be a number of at least 0, got {number!r}")
    return number


def _expect(
    group: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    part = group.get(name)
    if part is None or tuple(part.shape) != shape or part.dtype != dtype:
        found = "nothing" if part is None else f"{tuple(part.shape)} {part.dtype}"
        raise LayoutError(f"{name} must be {shape} {dtype}, got {found}")
    return part
