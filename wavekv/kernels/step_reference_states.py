"""The attention states of a decode step in plain torch: the second half of `step_reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from wavekv.kernels import reference
from wavekv.kernels.reference_levels import estimate_levels
from wavekv.kernels.step import (
    ATTEND_TOKENS,
    ATTENDED,
    END,
    PAGES,
    REFINED,
    START,
    StepPages,
    StepPool,
    StepScratch,
    StepShape,
    StepSteady,
    StepTotals,
)
from wavekv.kernels.step_reference_shift import shift_of_pages


def attend(
    query: Tensor,
    steady: StepSteady,
    pool: StepPool,
    counters: Tensor,
    scratch: StepScratch,
    shape: StepShape,
    *,
    pages: bool,
) -> None:
    page_parts = shape.page_parts
    if pages:
        for part in range(page_parts):
            j = slice(part * shape.attend_pages, (part + 1) * shape.attend_pages)
            slots, tokens = scratch.slots[:, :, j].long(), scratch.tokens[:, :, j]
            index = slots.clamp(min=0)[..., None, None, None]
            held = pool.pages.gather(2, index.expand(*slots.shape, *pool.pages.shape[3:]))
            position = torch.arange(shape.page_size, device=query.device)
            live = (position < tokens.unsqueeze(-1)) & (slots >= 0).unsqueeze(-1)
            keys, values = held[:, :, :, 0].flatten(2, 3), held[:, :, :, 1].flatten(2, 3)
            _put_state(query, keys, values, live.flatten(2), part, scratch, shape)
        return
    start, end = int(counters[START]), int(counters[END])
    slot = torch.arange(shape.sinks + shape.ring, device=query.device)
    position = start + (slot - shape.sinks - start) % shape.ring
    live = ((slot < shape.sinks) | (position <= end)) & steady.valid
    for part in range(page_parts, shape.attend_parts):
        first = (part - page_parts) * ATTEND_TOKENS
        t = slice(first, first + ATTEND_TOKENS)
        here = live[:, None, t].expand(-1, shape.kv_heads, -1)
        _put_state(query, steady.keys[:, :, t], steady.values[:, :, t], here, part, scratch, shape)


def value_slope(
    query: Tensor, pages: StepPages, counters: Tensor, scratch: StepScratch, shape: StepShape
) -> None:
    spans = -(-int(counters[PAGES]) // shape.span_pages)
    scatter = pages.scatter[:, :, :spans]
    scratch.slope[:, :, :spans] = reference.value_slope(query, scatter, scale=shape.scale)
    scratch.slope_spread[:, :, :spans] = 1 / scratch.slope_spread.shape[3]


def estimate(pages: StepPages, counters: Tensor, scratch: StepScratch, shape: StepShape) -> None:
    """The states of all pages but the attended ones, as parts of `part_out` and `part_lse` from
    `shape.attend_parts` on, of `shape.estimate_block` pages each.

    A page's mass goes to the mean value of its block; a refined page adds its own mixed residual,
    and the sum of these is mixed back. With second moments the sum of mass times shift of a part
    goes to the slope of its span.
    Reads `status`, `log_mass`, the shifts (see `StepScratch.shift`), `slope`, `slope_spread`; the
    mean values of all blocks, and those of refined pages.
    """
    n, block = int(counters[PAGES]), shape.estimate_block
    use_slope = shape.tail == "second"
    index, status = pages.summary.in_pages(0, n), scratch.status[..., :n]
    numbers = torch.arange(n, device=status.device)
    is_refined = (status == REFINED).repeat_interleave(shape.group, 1)
    shift = torch.where(is_refined, scratch.shift[..., :n], shift_of_pages(index, scratch, shape))
    for part, first in enumerate(range(0, n, block)):
        last = min(n, first + block)
        own, here = status[..., first:last], numbers[: last - first]
        span = first // shape.span_pages
        out, lse = estimate_levels(
            scratch.log_mass[..., first:last],
            index.in_pages(first, last),
            torch.where(own == ATTENDED, here, -1),
            torch.where(own == REFINED, here, -1),
            shift[..., first:last] if use_slope else None,
            scratch.slope[:, :, span : span + 1] if use_slope else None,
            span_pages=block,
        )
        scratch.part_out[:, :, shape.attend_parts + part] = out
        scratch.part_lse[:, :, shape.attend_parts + part] = lse


def merge(
    counters: Tensor,
    scratch: StepScratch,
    totals: StepTotals,
    sinks: Tensor | None,
    shape: StepShape,
) -> None:
    parts = shape.attend_parts + -(-int(counters[PAGES]) // shape.estimate_block)
    lse, out = scratch.part_lse[:, :, :parts], scratch.part_out[:, :, :parts]
    everything, tail = lse.logsumexp(-1), lse[..., shape.attend_parts :].logsumexp(-1)
    totals.tail_mass.add_(torch.exp(tail - everything).nan_to_num(nan=0.0))
    if shape.tail == "none":
        lse, out = lse[..., : shape.attend_parts], out[..., : shape.attend_parts, :]
    if sinks is not None:
        lse = torch.cat([lse, sinks.float().reshape(1, -1, 1).expand(*lse.shape[:2], 1)], -1)
        out = torch.nn.functional.pad(out, (0, 0, 0, 1))
    weights = lse.softmax(-1).nan_to_num(nan=0.0)
    scratch.out.copy_((weights.unsqueeze(2) @ out).squeeze(2))


def _put_state(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    live: Tensor,
    part: int,
    scratch: StepScratch,
    shape: StepShape,
) -> None:
    keys, values = keys.float(), values.float()
    out, lse = reference._attend(query, keys, values, live, shape.scale, shape.softcap)
    scratch.part_out[:, :, part], scratch.part_lse[:, :, part] = out, lse
