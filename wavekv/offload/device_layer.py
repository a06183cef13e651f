"""One layer while a decode engine has it: its context in buffers of fixed capacity, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wavekv.kernels.step import (
    StepPages,
    StepPool,
    StepShape,
    StepSteady,
    StepTotals,
    empty_pool,
    empty_totals,
)
from wavekv.offload.context import LayerContext
from wavekv.offload.paged import PagedZone


class GrownPages(NamedTuple):
    """Pages that an engine appended to the buffers of all layers; on the host."""

    end: int
    """The position behind their last token."""
    page_ids: Tensor
    """[layers, B, Hkv, n] int64 arena ids."""
    counts: Tensor
    """[layers, B, Hkv, n] int32"""
    token_ids: Tensor
    """[layers, B, Hkv, n, P] int32"""


class DeviceLayer:
    """The tensors that a step of one layer works on."""

    def __init__(
        self,
        context: LayerContext,
        steady: StepSteady,
        shape: StepShape,
        host_slots: Tensor | None = None,
    ) -> None:
        """The index of `context` gets buffers of `shape.capacity` pages; its local tokens are
        copied to `steady`, all of it at once. host_slots: of `StepPages`."""
        self.context, self.steady = context, steady
        self.is_given_back = False
        zone = context.steady
        self.pages = fitted_pages(context.paged, shape)._replace(host_slots=host_slots)
        self.pool: StepPool = empty_pool(shape, zone.keys.view.dtype, zone.keys.view.device)
        self.totals: StepTotals = empty_totals(shape, zone.keys.view.device)
        A = shape.sinks
        slots = A + torch.arange(zone.start, zone.end, device=steady.keys.device) % shape.ring
        for mine, theirs in ((steady.keys, zone.keys.view), (steady.values, zone.values.view)):
            mine[:, :, :A] = theirs[:, :, :A]
            mine[:, :, slots] = theirs[:, :, A:]
        steady.valid[:, :A] = zone.valid.view[:, :A]
        steady.valid[:, slots] = zone.valid.view[:, A:]

    def give_back(
        self, number: int, grown: list[GrownPages], start: int, end: int, shape: StepShape
    ) -> None:
        """Bring the context to where the steps left it. number: which layer this is of `grown`."""
        paged, zone = self.context.paged, self.context.steady
        slots = torch.arange(start, end, device=self.steady.keys.device) % shape.ring
        slots += shape.sinks
        # what needs memory comes first: from the first claim on nothing fails
        keys, values = self.steady.keys[:, :, slots], self.steady.values[:, :, slots]
        valid = self.steady.valid[:, slots]
        has_gaps = not bool(valid.all())
        for part in (zone.keys, zone.values, zone.valid):
            part.reserve(shape.sinks + end - start)
        for pages in grown:
            n = pages.page_ids.shape[-1]
            paged.index.claim(n)
            paged.page_ids.append(pages.page_ids[number])
            paged.counts.append(pages.counts[number])
            paged.token_ids.append(pages.token_ids[number])
            paged.segments.append((pages.end, paged.num_pages))
        spans = -(-paged.num_pages // shape.span_pages)
        paged.scatter.spans.claim(spans - len(paged.scatter.spans))
        zone.restart(start, end, keys, values, valid)
        zone.has_gaps |= has_gaps
        self.is_given_back = True

    def check_integrity(self, number: int) -> None:
        """Raise RuntimeError, naming this layer by its number, unless page table and pool agree."""
        table, owner = self.pool.table.cpu(), self.pool.owner.cpu()
        B, H, S = owner.shape
        for b in range(B):
            for h in range(H):
                slots = (owner[b, h] >= 0).nonzero().squeeze(1)
                pages = owner[b, h, slots].long()
                resident = (table[b, h] >= 0).nonzero().squeeze(1)
                is_right = torch.equal(table[b, h, pages].long(), slots)
                if not is_right or not torch.equal(resident, pages.sort().values):
                    raise RuntimeError(
                        f"pool integrity: layer {number}, sequence {b}, KV head {h}: the page "
                        f"table names {len(resident)} resident pages, {len(slots)} of {S} "
                        "slots have owners, and they do not match"
                    )

    def count(self, steps: int, num_tokens: float, grown: list[GrownPages]) -> None:
        """Add what `steps` steps over about `num_tokens` tokens did to the context's counters."""
        counters, totals = self.context.counters, self.totals
        page_bytes = self.context.paged.arena.layout.page_bytes
        counters.steps += steps
        retrieved = totals.paging[..., 3].double().mean() / num_tokens
        counters.retrieved_share = counters.retrieved_share + retrieved
        counters.tail_mass = counters.tail_mass + totals.tail_mass.mean()
        hits, fetched_now, left = (int(totals.paging[..., i].sum()) for i in range(3))
        counters.pool_wanted += hits + fetched_now + left
        counters.pool_missing += fetched_now + left
        counters.num_late += left
        fetched = int(totals.paging[..., [1, 4]].sum())
        counters.bytes_to_device += fetched * page_bytes
        pages = sum(pages.page_ids[0].numel() for pages in grown)
        counters.bytes_to_host += pages * page_bytes


def fitted_pages(paged: PagedZone, shape: StepShape) -> StepPages:
    """The index of `paged` in buffers of exactly `shape.capacity` pages, in place."""
    paged.index.fit(shape.capacity)
    spans = paged.scatter.spans
    spans.fit(-(-shape.capacity // shape.span_pages))
    # pages to come are added to their span
    spans.buffer[:, :, len(spans) :] = 0
    ids = paged.page_ids.view
    size = *ids.shape[:2], shape.capacity
    arena_ids = torch.zeros(size, dtype=torch.int64, device=spans.buffer.device)
    arena_ids[:, :, : ids.shape[2]] = ids
    return StepPages(paged.index.buffer, spans.buffer, arena_ids)
