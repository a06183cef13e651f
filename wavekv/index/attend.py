"""Attention over an index: the decode step of the offload engine, for keys that need no model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wavekv.index.inputs import expect_positive, expect_share, pages_in_budget
from wavekv.index.levels import LevelPages, Logits, choose_of_levels, estimate_of_levels
from wavekv.index.pages import PageStore
from wavekv.index.scatter import SpanScatter
from wavekv.index.state import IndexState
from wavekv.kernels import attend_dense, attend_pages, merge_state
from wavekv.kernels.page_index import PageIndex

_REFINE = 32
"""So many budgets of pages are ranked again by the codes of their keys."""
_MASSES_AT_ONCE = 1 << 25


@dataclass(frozen=True, slots=True)
class AttendOptions:
    """How many pages attention reads, and for which logits; see `WaveIndex.attend`."""

    budget: float | int
    top_p: float | None
    group: int
    scale: float
    softcap: float | None

    def __post_init__(self) -> None:
        if self.top_p is not None:
            expect_share("top_p", self.top_p)
        pages_in_budget(self.budget, 1, 1)
        expect_positive("scale", self.scale)
        if self.softcap is not None:
            expect_positive("softcap", self.softcap)

    @property
    def logits(self) -> Logits:
        """How inner products become logits."""
        return Logits(self.scale, self.softcap)

    def page_limits(self, num_pages: int, page_size: int) -> tuple[int, int]:
        """(least, most) pages that a query may read, of so many."""
        most = pages_in_budget(self.budget, num_pages, page_size)
        return (0 if self.top_p is not None else most), most


def attend_state(queries: Tensor, state: IndexState, options: AttendOptions) -> tuple[Tensor, ...]:
    """The fields of an `AttendResult`, with queries [H, Q, D] float32, of which `group` consecutive
    ones share their pages. Masses of 128 MiB at a time."""
    group = options.group
    step = max(1, _MASSES_AT_ONCE // (len(queries) * max(1, state.pages.num_pages)) // group)
    parts = [_attend(part, state, options) for part in queries.split(step * group, 1)]
    if len(parts) == 1:
        return parts[0]
    return tuple(torch.cat(part, 1) for part in zip(*parts, strict=True))


def _attend(
    queries: Tensor, state: IndexState, options: AttendOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    H, Q, _ = queries.shape
    group, logits, tail = options.group, options.logits, state.tail
    B = Q // group
    # queries that share their pages are heads of one group, and groups a batch: [B, H * G, D]
    query = _by_group(queries, group)
    keys, values = (tail[:, half].expand(B, *tail[:, half].shape) for half in range(2))
    scale, softcap = logits
    near = attend_dense(query, keys, values, None, scale=scale, softcap=softcap)
    attended = torch.full((H, Q), tail.shape[2], device=queries.device)
    if state.scatter is None or state.pages.num_pages == 0:
        out, lse = (_by_query(x, H, group) for x in near)
        return out, lse, attended, torch.zeros_like(lse)
    pages = _level_pages(state, state.scatter, B)
    key_unit, value_unit = state.units.repeat_interleave(group, 0).unsqueeze(-1).unbind(1)
    asked = query * key_unit
    least, most = options.page_limits(state.pages.num_pages, state.params.page_size)
    choice = choose_of_levels(
        asked, pages, logits, least=least, most=most, top_p=options.top_p, refine=_REFINE
    )
    chosen = _attend_chosen(query, state.pages, choice.pages, logits)
    others, others_lse = estimate_of_levels(asked, choice, pages, scale)
    rest = others * value_unit, others_lse
    out, lse = merge_state(*merge_state(*near, *chosen), *rest)
    read = (choice.pages >= 0).sum(2) * state.params.page_size
    attended = attended + read.T.repeat_interleave(group, 1)
    estimated = _by_query((rest[1] - lse).exp(), H, group)
    return _by_query(out, H, group), _by_query(lse, H, group), attended, estimated


def _attend_chosen(
    query: Tensor, pages: PageStore, chosen: Tensor, logits: Logits
) -> tuple[Tensor, Tensor]:
    """The attention state of the chosen pages [B, H, M], read where they lie."""
    buffer = pages.buffer("pages")
    H, capacity = buffer.shape[:2]
    first = torch.arange(H, device=query.device)[:, None] * capacity
    ids = torch.where(chosen >= 0, chosen + first, -1)
    counts = torch.where(chosen >= 0, buffer.shape[3], 0).to(torch.int32)
    scale, softcap = logits
    return attend_pages(query, [buffer.flatten(0, 1)], ids, counts, scale=scale, softcap=softcap)


def _level_pages(state: IndexState, scatter: SpanScatter, batch: int) -> LevelPages:
    """The pages as each of `batch` groups of queries sees them: views."""
    index = PageIndex._make(part.expand(batch, *part.shape) for part in state.page_index)
    return LevelPages(
        index, scatter.spans.view.expand(batch, -1, -1, -1, -1, -1), scatter.span_pages
    )


def _by_group(queries: Tensor, group: int) -> Tensor:
    """[H, B * G, D] -> [B, H * G, D]."""
    H, Q, D = queries.shape
    B = Q // group
    return queries.view(H, B, group, D).transpose(0, 1).reshape(B, H * group, D)


def _by_query(x: Tensor, heads: int, group: int) -> Tensor:
    """[B, H * G, ...] -> [H, B * G, ...]."""
    B = x.shape[0]
    return x.view(B, heads, group, *x.shape[2:]).transpose(0, 1).flatten(1, 2)
