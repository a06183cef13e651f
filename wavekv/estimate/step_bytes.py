"""What a decode step reads and moves, in bytes of all layers."""

from __future__ import annotations

from dataclasses import dataclass

from wavekv.config import OffloadConfig
from wavekv.index.levels import num_finalists
from wavekv.offload.budget import page_limits
from wavekv.offload.engine_shape import LIKELY_SHARES
from wavekv.offload.sizes import CacheBytes, CacheShape

HIT_RATE = 0.85
"""Of chosen pages in a pool of at least two budgets: measured at a million tokens where two thirds
of the pages are chosen again (docs/million.md; 0.82 before pages were fetched ahead)."""
REUSE = 0.66
"""Of chosen pages that the step before chose too: what a pool of one budget finds; larger ones lie
between."""
_IN_VAIN = 0.3
"""Of the pages that rank highest at first, those that are not chosen in the end."""
_FOUND_OF_THEM = 0.85
"""How much of these a pool has, as a share of what it has of the chosen ones: at a million tokens
72 % where that is 85."""


@dataclass(frozen=True, slots=True)
class StepBytes:
    """From device memory, or on a CPU from its own, unless said otherwise."""

    weights: int
    ranking: int
    """Blocks, mean keys, variances and counts."""
    scores: int
    """Log masses and ranks: what kernels write and others read."""
    codes: int
    """The high plane of candidates, both of finalists."""
    estimating: int
    """Mean values of candidates, the scatter."""
    pages: int
    """That are attended to."""
    steady: int
    fetched: int
    """From the host over the bus."""

    @property
    def read(self) -> int:
        """All but what is fetched, or left from kernel to kernel: at least so much is read."""
        ranking = self.ranking + self.codes
        return self.weights + ranking + self.estimating + self.pages + self.steady


def step_bytes(
    config: OffloadConfig,
    shape: CacheShape,
    cache: CacheBytes,
    *,
    weights: int,
    windows: int,
    slots: int | None,
    hits: float | None = None,
) -> StepBytes:
    """Of one step. weights, windows: bytes of them that it reads. slots: those of the page pool for
    each KV head, 0 without a pool; None where no bus is between pages and steps. hits: the share of
    chosen pages that the pool has, if it is known."""
    N, index, page = cache.num_pages, cache.index, config.page_size
    rows = shape.layers * shape.batch * shape.kv_heads
    most = min(N, page_limits(config, shape.num_tokens + 1)[1])
    candidates = finalists = 0
    if config.refine > 1 and most < N:
        candidates = min(N, most * config.refine)
        finalists = min(N, most * num_finalists(config.refine))
    pool_page = cache.layout.dense_bytes
    local = shape.num_tokens - N * page
    # of a page, numbers of four bytes: the log mass of each query head is written, and read in each
    # of three stages and by the estimate; ranks are of a KV head, written and read in each stage
    masses, ranks = 4 * rows * N * shape.group, 4 * rows * N
    ranking = index["mean keys"] + index["variances"] + index["counts"]
    blocks = index["blocks"]
    scatter = index["scatter"] if config.tail_estimate == "second" else 0
    fetched = 0
    if slots is not None:
        found = hit_rate(slots, most, N) if hits is None or slots < most else hits
        # where misses are bounded, nothing is fetched before it is chosen
        in_vain = 0.0 if config.max_misses else fetched_in_vain(slots, most, found)
        share = 1 - found + in_vain
        fetched = round(rows * most * share) * cache.layout.page_bytes
    return StepBytes(
        weights=weights,
        ranking=ranking + blocks,
        scores=5 * masses + 6 * ranks,
        codes=(index["high codes"] * (candidates + finalists) + index["low codes"] * finalists)
        // max(1, N),
        estimating=index["mean values"] * candidates // max(1, N) + scatter,
        pages=rows * most * pool_page,
        steady=rows * local * pool_page // page + windows,
        fetched=fetched,
    )


def hit_rate(slots: int, most: int, num_pages: int) -> float:
    """The share of chosen pages that a pool of so many slots has, by what was measured."""
    if slots >= num_pages:
        return 1.0
    if slots < most:
        # no pool
        return 0.0
    return REUSE + (HIT_RATE - REUSE) * min(1.0, slots / most - 1)


def fetched_in_vain(slots: int, most: int, found: float) -> float:
    """Pages that are fetched ahead and not chosen, as a share of the budget: of those that rank
    highest at first, those that the pool lacks, which has `found` of the chosen ones."""
    if slots < most:
        return 0.0
    early = min(LIKELY_SHARES[0], (slots / most - 1) / len(LIKELY_SHARES))
    return _IN_VAIN * early * (1 - found * _FOUND_OF_THEM)
