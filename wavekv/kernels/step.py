"""The tensors of a decode step on a device: fixed shapes at fixed addresses, so that one CUDA graph
can hold the step while the context grows. What changes from step to step is read on the device.

Letters as in `wavekv.kernels.reference`; besides N pages of capacity, K pages in a block (N is a
multiple of it), S slots of the page pool and M pages that a step may choose, for each KV head; A
sink tokens, and L local tokens in a ring; W is D rounded up to a multiple of 32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from wavekv.kernels.page_codec import PageCodec
from wavekv.kernels.page_index import PageIndex
from wavekv.kernels.planes import num_words

END, CLOCK, PAGES, START = range(4)
"""Places in `counters`: the position of the new token and the number of the step, which every step
advances; the pages in use (whole blocks) and the position of the oldest local token, which growth
changes."""

LEAST, MOST, CANDIDATES, FINALISTS, WIDE, LIKELY = range(6)
NUM_LIMITS = LIKELY + 2
"""Places in `limits`: the least and most pages that a KV head chooses, how many are ranked again by
the high plane of their codes (0: none) and by both planes, how many are chosen for a prefetch (at
least the most), and how many are likely to be chosen (0: none) in the first stage of ranking; in
the second at `LIKELY + 1`."""

FIRST, SECOND, FINAL = range(3)
"""Stages of ranking: for candidates, for finalists, and for the choice."""

ESTIMATED, REFINED, ATTENDED = range(3)
"""The status of a page in a step: estimated with the mean value of its block, estimated with its
own, attended to exactly."""

CHOSEN, AHEAD, LATER = range(3)
"""What pages are given slots for: this step attends to them; it will likely choose them; a later
one may."""

NUM_BINS = 2048
BIN_SHIFT = 17
"""Ranks are binned by the upper bits of their float32: 64 bins for each power of two, 32 powers."""

SCORE_BLOCK = 512
"""Pages that are scored together, with one pair of softmax statistics."""
SAMPLES = (1024, 4), (8192, 16)
"""Where so many pages are wanted for a closer look, one in so many tells where they begin."""

COUNT_BLOCK = 1024
"""Pages of which those above a threshold are collected together."""
SLOPE_ROWS = 32
"""Rows of the scatter that one program reads."""
MANY_PAGES = 32768
"""Pages of a KV head from which parts of the estimate are twice as large."""
ATTEND_TOKENS = 64
"""Tokens of the steady zone in one part of the split attention."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """What is fixed for a captured step."""

    batch: int
    kv_heads: int
    group: int
    head_dim: int
    page_size: int
    capacity: int
    """N, pages of a KV head that the buffers hold."""
    most: int
    """M, the largest value that `limits[MOST]` takes."""
    slots: int
    """S, slots of the pool for each KV head; at least M."""
    misses: int
    """Pages that a KV head may bring from the host in a step. What is left out is estimated."""
    sinks: int
    ring: int
    """Slots of local tokens; a token at position p is in slot p % ring."""
    span_pages: int
    """Pages of a span: whole blocks."""
    block_pages: int
    """K"""
    scale: float
    softcap: float | None = None
    top_p: float | None = None
    tail: str = "second"
    codec: PageCodec | None = None
    """How the host stores pages, if not as the pool does."""
    is_wide: bool = False
    """Whether `limits[WIDE]` may be more than `limits[MOST]`: a prefetch follows."""

    @property
    def rows(self) -> int:
        """B * Hkv."""
        return self.batch * self.kv_heads

    @property
    def estimate_block(self) -> int:
        """Pages whose estimate is one part: inside one span, and whole blocks. Few parts are fewer
        states to merge, many keep a GPU busy."""
        return min(512 if self.capacity >= MANY_PAGES else 256, self.span_pages & -self.span_pages)

    @property
    def attend_pages(self) -> int:
        """Chosen pages that are one part of the exact attention: about 128 tokens."""
        tokens = 128 if self.head_dim <= 128 else 64
        return max(1, tokens // (1 << (self.page_size - 1).bit_length()))

    @property
    def attend_parts(self) -> int:
        """Parts of the exact attention: of chosen pages, then of the steady zone."""
        return self.page_parts + -(-(self.sinks + self.ring) // ATTEND_TOKENS)

    @property
    def page_parts(self) -> int:
        """Parts of the exact attention to chosen pages."""
        return -(-self.most // self.attend_pages)

    @property
    def estimate_parts(self) -> int:
        """Parts of the estimate."""
        return -(-self.capacity // self.estimate_block)


class StepPages(NamedTuple):
    """What the device holds of all pages of a layer; the first `counters[PAGES]` of N are in
    use."""

    summary: PageIndex
    """Of [B, Hkv] rows. What belongs to an empty page may be anything, its count excepted."""
    scatter: Tensor
    """[B, Hkv, spans, 2, D, D] bfloat16"""
    arena_ids: Tensor
    """[B, Hkv, N] int64: the id of each page in the host arena."""
    host_slots: Tensor | None = None
    """[ids] int64: where host memory has each page of the arena, -1 where it has it not; None if an
    id is that place."""


class StepPool(NamedTuple):
    """The pages of a layer that the device holds whole."""

    pages: Tensor
    """[B, Hkv, S, 2, P, D]"""
    table: Tensor
    """[B, Hkv, N] int32: the slot of each page, -1 for none."""
    owner: Tensor
    """[B, Hkv, S] int32: the page in each slot, -1 for none."""
    age: Tensor
    """[B, Hkv, S] int32: the step that used the slot last, -1 for none."""
    ahead: Tensor
    """[B, Hkv, S] int32: the last step that filled the slot ahead of its choice, -1 for none."""
    order: Tensor
    """[B, Hkv, S] int32: the slots, least recently used first, of equal ones the lower, as the step
    before left them."""


class StepSteady(NamedTuple):
    """The steady zone of a layer: A sinks, then the ring of local tokens."""

    keys: Tensor
    """[B, Hkv, A + L, D]"""
    values: Tensor
    """[B, Hkv, A + L, D]"""
    valid: Tensor
    """[B, A + L] bool"""


class StepArena(NamedTuple):
    """The host arena as a device sees it."""

    chunks: Tensor
    """[num chunks] int64 addresses of pinned memory, on the device."""
    pages_per_chunk: int
    memory: list[Tensor]
    """The chunks themselves, on the host."""


class StepScratch(NamedTuple):
    """Working memory, shared by all layers; nothing in it outlives a layer's step."""

    query_words: Tensor
    """[B, Hq, W / 4] int32: the scaled and mixed query as int8, four dimensions to a word in their
    order, zeros behind."""
    query_step: Tensor
    """[B, Hq, 2] float32: the logit that one step of it is worth, and the sum of its int8."""
    query_square: Tensor
    """[B, Hq] float32: |q|^2 of the scaled query."""
    block_logits: Tensor
    """[B, Hq, N / K] float32 logit of the mean key of each block, before a soft cap."""
    log_mass: Tensor
    """[B, Hq, N] float32"""
    shift: Tensor
    """[B, Hq, N] float32, of refined pages; under a soft cap of all. Without a cap the shift of
    other pages follows from `query_square`, their variance and their count."""
    status: Tensor
    """[B, Hkv, N] uint8: `ESTIMATED`, `REFINED` or `ATTENDED`."""
    block_max: Tensor
    """[B, Hq, blocks] float32, with the next the softmax statistics of groups of pages."""
    block_sum: Tensor
    rank: Tensor
    """[B, Hkv, N] int32: the bits of the float32 rank; -1 for empty pages."""
    histogram: Tensor
    """[3, B, Hkv, NUM_BINS] int32, of the ranks of each stage."""
    arrived: Tensor
    """[3, B, Hkv] int32 blocks that have added to the histogram."""
    threshold: Tensor
    """[3, B, Hkv] int32 the least rank of a bin that is wanted in each stage."""
    likely: Tensor
    """[2, B, Hkv] int32 the least rank of a bin of pages that are likely to be chosen, as the first
    two stages see it."""
    block_count: Tensor
    """[B, Hkv, N / COUNT_BLOCK] int32 ranks of each block that reach a threshold."""
    listed: Tensor
    """[B, Hkv, N] int32 their pages, ascending; of candidates each block's from its own start
    on."""
    listed_rank: Tensor
    """[B, Hkv, N] int32 their final ranks."""
    chosen: Tensor
    """[B, Hkv, M] int32 chosen pages, ascending, then -1."""
    slots: Tensor
    """[B, Hkv, M] int32 their slots; -1 for pages left to the estimate."""
    tokens: Tensor
    """[B, Hkv, M] int32 tokens in them."""
    victims: Tensor
    """[B, Hkv, misses] int32 slots to fill."""
    wanted: Tensor
    """[B, Hkv, misses] int64 arena pages to fill them with."""
    num_misses: Tensor
    """[B, Hkv] int32"""
    part_out: Tensor
    """[B, Hq, parts, D] float32: the states of attention parts, then of estimate parts."""
    part_lse: Tensor
    """[B, Hq, parts] float32"""
    slope: Tensor
    """[B, Hq, spans, D] float32, times `slope_spread`."""
    slope_spread: Tensor
    """[B, Hq, spans, D / SLOPE_ROWS] float32: parts of the spread that the slope is to be divided
    by."""
    out: Tensor
    """[B, Hq, D] in the dtype of the model."""


class StepTotals(NamedTuple):
    """Sums over the steps of a layer."""

    paging: Tensor
    """[B, Hkv, 5] int64: pages found in the pool, pages fetched for a step that attends to them,
    pages left to the estimate, tokens retrieved, pages fetched for others."""
    tail_mass: Tensor
    """[B, Hq] float32"""


def empty_scratch(shape: StepShape, dtype: torch.dtype, device: torch.device) -> StepScratch:
    """Allocate the working memory of a step; dtype is that of the output."""
    B, H, G, D, N = shape.batch, shape.kv_heads, shape.group, shape.head_dim, shape.capacity
    Hq, parts = H * G, shape.attend_parts + shape.estimate_parts
    stats = -(-N // SCORE_BLOCK)
    spans = -(-N // shape.span_pages)

    def new(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    def ints(*size: int) -> Tensor:
        return new(*size, dtype=torch.int32)

    return StepScratch(
        query_words=ints(B, Hq, 8 * num_words(D, 1)),
        query_step=new(B, Hq, 2),
        query_square=new(B, Hq),
        block_logits=new(B, Hq, -(-N // shape.block_pages)),
        log_mass=new(B, Hq, N),
        shift=new(B, Hq, N),
        status=new(B, H, N, dtype=torch.uint8),
        block_max=new(B, Hq, stats),
        block_sum=new(B, Hq, stats),
        rank=ints(B, H, N),
        histogram=ints(3, B, H, NUM_BINS),
        arrived=ints(3, B, H),
        threshold=ints(3, B, H),
        likely=ints(2, B, H),
        block_count=ints(B, H, -(-N // COUNT_BLOCK)),
        listed=ints(B, H, N),
        listed_rank=ints(B, H, N),
        chosen=ints(B, H, shape.most),
        slots=ints(B, H, shape.most),
        tokens=ints(B, H, shape.most),
        victims=ints(B, H, shape.misses),
        wanted=new(B, H, shape.misses, dtype=torch.int64),
        num_misses=ints(B, H),
        part_out=new(B, Hq, parts, D),
        part_lse=new(B, Hq, parts),
        slope=new(B, Hq, spans, D),
        slope_spread=new(B, Hq, spans, -(-D // SLOPE_ROWS)),
        out=new(B, Hq, D, dtype=dtype),
    )


def empty_pool(shape: StepShape, dtype: torch.dtype, device: torch.device) -> StepPool:
    """Allocate a pool that holds no page."""
    B, H, S = shape.batch, shape.kv_heads, shape.slots
    numbers = torch.arange(S, dtype=torch.int32, device=device)
    empty = torch.full((B, H, S), -1, dtype=torch.int32, device=device)
    return StepPool(
        torch.zeros(B, H, S, 2, shape.page_size, shape.head_dim, dtype=dtype, device=device),
        torch.full((B, H, shape.capacity), -1, dtype=torch.int32, device=device),
        empty,
        empty.clone(),
        empty.clone(),
        numbers.expand(B, H, S).clone(),
    )


def empty_totals(shape: StepShape, device: torch.device) -> StepTotals:
    """Sums over no steps."""
    B, H = shape.batch, shape.kv_heads
    return StepTotals(
        torch.zeros(B, H, 5, dtype=torch.int64, device=device),
        torch.zeros(B, H * shape.group, dtype=torch.float32, device=device),
    )


def is_sampled(pages: Tensor, every: int) -> Tensor:
    """Which of pages [n], numbers, are in a sample of one in `every`, a power of two up to 16: of
    each block of 16 another one."""
    return ((pages ^ (pages >> 4)) & (every - 1)) == 0


def sampled_every(wanted: int, stage: int) -> int:
    """How many pages one of a sample stands for; 1 in the `FINAL` stage."""
    every = [1, *(every for least, every in SAMPLES if stage != FINAL and wanted >= least)]
    return every[-1]


def bin_base(group: int) -> int:
    """The number of the lowest bin: the highest holds ranks up to 2 * group, and the lowest all
    that are smaller than the others' range."""
    top = torch.tensor(2.0 * group).view(torch.int32)
    return (int(top) >> BIN_SHIFT) - (NUM_BINS - 1)
