"""The end of a prompt, paged out in all layers at once.

What is left of a prompt is cut into ever shorter segments, and on a GPU a short one takes as long
to build as a long one: its kernels are small and many. Layers hold the same stretch of tokens, so
their segments of one length are built as if they were one layer with more sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import fields, replace
from functools import partial

import torch
from torch import Tensor

from wavekv.kernels.page_index import PageIndex
from wavekv.kvstore import TieredArena
from wavekv.offload.builder import BATCH_BYTES, SegmentBatch, build_segments
from wavekv.offload.context import LayerContext
from wavekv.offload.paged import SegmentPages


def page_out_together(contexts: Sequence[LayerContext]) -> None:
    """`LayerContext.page_out` of all of them.

    Raises:
        CapacityError: the pages do not fit cpu_budget; no page is built then.
    """
    for context in contexts:
        context.settle()
    groups: dict[object, list[LayerContext]] = {}
    for context in contexts:
        groups.setdefault(_kind(context), []).append(context)
    for group in groups.values():
        _page_out(group)


def _kind(context: LayerContext) -> object:
    """Layers of one kind have the same segments to build."""
    steady, paged = context.steady, context.paged
    # where memory is only a part of what pages take, it has those of one layer at a time
    own = context if isinstance(paged.arena, TieredArena) else None
    return (
        own,
        *(context.shape, paged.arena, paged.scatter.span_pages, paged.num_pages),
        *(steady.keys.view.device, steady.start, steady.end, steady.is_ragged),
        steady.num_sink_slots,
    )


def _page_out(contexts: list[LayerContext]) -> None:
    due: list[list[SegmentBatch]] = []
    try:
        for context in contexts:
            due.append(context.due())
        if not due[0]:
            return
        built = _build(contexts, due)
    except BaseException:
        for context in contexts:
            context.paged.give_up()
        raise
    for context, batches, pages in zip(contexts, due, built, strict=True):
        context.await_pages(batches, pages)


def _build(
    contexts: list[LayerContext], due: list[list[SegmentBatch]]
) -> list[Future[list[SegmentPages]]]:
    """Have pages built; the result of each layer. due: of each layer, the same batches."""
    first = contexts[0]
    builder, device = first.runtime.builder, first.steady.keys.view.device
    paged, arena = first.paged, first.paged.arena
    sizes = paged.scatter.span_pages, paged.index.block_pages

    def build() -> list[list[SegmentPages]]:
        pages: list[list[SegmentPages]] = [[] for _ in due]
        # one after another of the segments, which layers have in the same order
        for of_layers in zip(*due, strict=True):
            at_once = max(1, BATCH_BYTES // (4 * of_layers[0].keys.numel()))
            for start in range(0, len(due), at_once):
                some = of_layers[start : start + at_once]
                parts = build_segments(_joined(some), arena, *sizes)
                for number, mine in enumerate(_split(parts, len(some)), start):
                    pages[number] += mine
        return pages

    whole = builder.submit(device, build)
    # by the same worker, so behind it
    return [builder.submit(device, partial(_of_layer, whole, i)) for i in range(len(due))]


def _of_layer(whole: Future[list[list[SegmentPages]]], number: int) -> list[SegmentPages]:
    return whole.result()[number]


def _joined(batches: Sequence[SegmentBatch]) -> SegmentBatch:
    """Batches of several layers as one of as many times the sequences."""

    def join(name: str) -> Tensor:
        return torch.cat([getattr(batch, name) for batch in batches])

    ids = zip(*(batch.page_ids for batch in batches), strict=True)
    return replace(
        batches[0],
        keys=join("keys"),
        values=join("values"),
        valid=None if batches[0].valid is None else join("valid"),
        page_ids=[torch.cat(of_segment) for of_segment in ids],
    )


def _split(segments: list[SegmentPages], count: int) -> list[list[SegmentPages]]:
    """The segments of each of `count` layers."""
    tensors = [field.name for field in fields(SegmentPages) if "Tensor" in str(field.type)]
    parts: list[list[SegmentPages]] = [[] for _ in range(count)]
    for segment in segments:
        cut = {name: getattr(segment, name).chunk(count) for name in tensors}
        index = zip(*(part.chunk(count) for part in segment.index), strict=True)
        for layer, mine, *own in zip(parts, index, *cut.values(), strict=True):
            changed = dict(zip(cut, own, strict=True))
            layer.append(replace(segment, index=PageIndex._make(mine), **changed))
    return parts
