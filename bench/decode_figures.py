"""What steps of wavekv's engine did: pages they found and fetched, bytes they read, slow ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from decode_fill import say
from decode_profile import time_singly
from decode_steps import WalkedSteps
from index_parts import BLOCKS, CANDIDATE, FINALIST, RANKING, index_page_bytes
from torch import Tensor

from wavekv.index.levels import num_finalists
from wavekv.kernels.step import MOST
from wavekv.offload.engine import DecodeEngine

REUSE_PAIRS = 4


def paging(engine: DecodeEngine, steps: int, page_bytes: int) -> dict[str, Any]:
    """What the pools did in so many steps."""
    totals = torch.stack([layer.totals.paging for layer in engine.layers])
    hits, fetched, left_out, _, prefetched = totals.sum((0, 1, 2)).tolist()
    chosen = max(1, hits + fetched + left_out)
    mass = torch.stack([layer.totals.tail_mass for layer in engine.layers]).mean() / steps
    by_layer = totals.sum((1, 2)).double()
    layer_hits = by_layer[:, 0] / by_layer[:, :3].sum(1)
    return {
        "hit_rate": hits / chosen,
        "layer_hit_rates": [round(rate, 4) for rate in layer_hits.tolist()],
        "left_out": left_out / chosen,
        "pages_chosen": chosen / steps,
        "pages_fetched": fetched / steps,
        "pages_prefetched": prefetched / steps,
        "pcie_bytes": round((fetched + prefetched) * page_bytes / steps),
        "estimated_mass": float(mass),
    }


def long_run(steps: WalkedSteps, count: int, device: torch.device) -> dict[str, Any]:
    """Steps one by one, enough of them to see the slowest, and pages being appended."""
    before = len(steps.engine.grown)
    times = time_singly(steps.step, count, device)
    say(f"{count} steps one by one")
    return {
        "steps": count,
        "ms_median": float(np.median(times)),
        "ms_p99": float(np.percentile(times, 99)),
        "ms_max": max(times),
        "appends": len(steps.engine.grown) - before,
        "series_ms": [round(ms, 2) for ms in times],
    }


def reuse_seen(steps: WalkedSteps) -> float:
    """The share of a step's chosen pages that the step before chose, mean over layers and heads."""
    shares, before = [], steps.watched_step().chosen
    for _ in range(REUSE_PAIRS):
        after = steps.watched_step().chosen
        for number, pages in after.items():
            others = before[number].long()
            held = torch.zeros(
                *others.shape[:2], 1 + steps.engine.shape.capacity, dtype=torch.bool
            ).to(others.device)
            # -1, for none, is the last
            held.scatter_(2, others.where(others >= 0, steps.engine.shape.capacity), True)
            is_page = pages >= 0
            shares.append(held.gather(2, pages.long().clamp(min=0))[is_page].float().mean())
        before = after
    return float(torch.stack(shares).mean())


def engine_bytes(engine: DecodeEngine) -> dict[str, int]:
    """Bytes of device memory that a step reads beside the weights, of all layers, by kind.

    Statistics that rank pages are read once to score; an early prefetch reads them, and codes,
    again for all layers but two. Working memory is not counted.
    """
    shape, pages = engine.shape, engine.layers[0].pages
    heads, layers, n = shape.rows, len(engine.layers), engine.num_pages
    most = min(int(engine.limits[MOST]), n)
    refine = engine.config.refine
    is_refined = refine > 1 and most < n
    candidates = min(n, most * refine) if is_refined else 0
    finalists = min(n, most * num_finalists(refine)) if is_refined else 0
    early = max(0, layers - 2) if engine.config.prefetch == "early" else 0

    def of_page(part: Tensor) -> int:
        return part[0, 0, 0].numel() * part.element_size()

    ranking, estimating, candidate, finalist = (
        index_page_bytes(pages.summary, names) for names in (RANKING, BLOCKS, CANDIDATE, FINALIST)
    )
    page = of_page(engine.layers[0].pool.pages)
    spans = -(-n // shape.span_pages) if shape.tail == "second" else 0
    steady = shape.sinks + engine.num_tokens - engine.start
    return {
        "statistics": round(heads * n * ((layers + early) * ranking + layers * estimating)),
        "codes": round(heads * (layers + early) * (candidates * candidate + finalists * finalist)),
        "scatter": heads * spans * layers * of_page(pages.scatter),
        "pages": heads * most * layers * page,
        "steady": heads * steady * layers * page // shape.page_size,
    }
