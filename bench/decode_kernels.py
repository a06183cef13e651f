"""Each kernel of the decode step by itself: time, and bytes over the time, beside a device copy.

    python bench/decode_kernels.py --contexts 131072 1048576

The layer is that of Llama-3.1-8B (Hq 32, Hkv 8, D 128, bfloat16), pages of 8 tokens, random keys.
Bytes are those that the kernel cannot avoid: what it reads and writes of pages, of the index and
of numbers kept for every page, once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import machine_record
from torch import Tensor

from wavekv.index import page_scatter
from wavekv.index.levels import index_of_pages, num_finalists
from wavekv.index.params import BLOCK_PAGES
from wavekv.kernels import cuda
from wavekv.kernels.page_index import PageIndex
from wavekv.kernels.step import (
    FINAL,
    FIRST,
    REFINED,
    SECOND,
    StepArena,
    StepPages,
    StepShape,
    StepSteady,
    empty_pool,
    empty_scratch,
    empty_totals,
)
from wavekv.kvstore import CODEC_BITS, KVLayout
from wavekv.offload.engine_shape import LIKELY_SHARES, POOL_BUDGETS

KV_HEADS, GROUP, DIM, PAGE, SPAN = 8, 4, 128, 8, 1024
DTYPE = torch.bfloat16
CHUNK = 1 << 16
"""Pages that are encoded at once."""
LOCAL, RING = 300, 576
"""Tokens in the ring, and its slots."""


class Run(NamedTuple):
    """A kernel to be timed."""

    run: Callable[[], None]
    num_bytes: Callable[[], float]
    """Once it has run."""
    before: Callable[[], object] = lambda: None
    """What has to be put back before it runs again, outside the time."""


def random_pages(num_pages: int, device: torch.device, seed: int = 0) -> tuple[StepPages, Tensor]:
    """The index of random pages, and the pages [Hkv, N, 2, P, D]."""
    random = torch.Generator(device).manual_seed(seed)
    parts: list[PageIndex] = []
    scatters: list[Tensor] = []
    pages = torch.empty(KV_HEADS, num_pages, 2, PAGE, DIM, dtype=DTYPE, device=device)
    counts = torch.full((KV_HEADS, num_pages), PAGE, dtype=torch.int32, device=device)
    for first in range(0, num_pages, SPAN):
        n = min(SPAN, num_pages - first)
        size = (KV_HEADS, n, PAGE, DIM)
        centres = torch.randn(KV_HEADS, n, 1, DIM, generator=random, device=device)
        keys = (centres + 0.6 * torch.randn(size, generator=random, device=device)).to(DTYPE)
        noise = torch.randn(size, generator=random, device=device)
        values = (0.3 * keys.float() + noise).to(DTYPE)
        here = counts[:, first : first + n]
        parts.append(index_of_pages(keys, values, here, BLOCK_PAGES))
        scatters.append(page_scatter(keys, values, here))
        pages[:, first : first + n] = torch.stack([keys, values], 2)
    summary = [torch.cat(part, 1)[None] for part in zip(*parts, strict=True)]
    ids = torch.arange(KV_HEADS * num_pages, device=device).view(1, KV_HEADS, num_pages)
    scatter = torch.stack(scatters, 1).bfloat16()[None]
    return StepPages(PageIndex._make(summary), scatter, ids), pages


def median_ms(
    run: Callable[[], None], before: Callable[[], object] = lambda: None, repeats: int = 20
) -> float:
    """Median of replays of a graph of one call, in ms, with the L2 cache emptied before each."""
    # read, not written: lines to be written back would share the bandwidth with what is timed
    flush = torch.zeros(64 << 20, dtype=torch.float32, device="cuda")
    before()
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats):
        before()
        flush.sum()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def copy_bandwidth() -> float:
    """GB/s of a device copy, bytes read and written."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source)) / 1e6


def nbytes(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(x.nbytes for x in tensors)


class Bench:
    """One layer at one context length, and the kernels of its step."""

    def __init__(self, context: int, refine: int, budget: float, host_dtype: str) -> None:
        device = torch.device("cuda")
        self.layout = KVLayout(PAGE, DIM, DTYPE, host_dtype)
        N = context // PAGE
        most = max(1, int(budget * N))
        self.shape = shape = StepShape(
            batch=1,
            kv_heads=KV_HEADS,
            group=GROUP,
            head_dim=DIM,
            page_size=PAGE,
            capacity=N,
            most=most,
            slots=POOL_BUDGETS * most,
            misses=most,
            sinks=4,
            ring=RING,
            span_pages=SPAN,
            block_pages=BLOCK_PAGES,
            scale=DIM**-0.5,
            codec=self.layout.codec,
        )
        self.pages, data = random_pages(N, device)
        self.arena = self._arena(data)
        self.pool = empty_pool(shape, DTYPE, device)
        self.scratch, self.totals = empty_scratch(shape, DTYPE, device), empty_totals(shape, device)
        self.counters = torch.tensor(
            [context, 1, N, context - LOCAL], dtype=torch.int32, device=device
        )
        likely = (int(share * most) for share in LIKELY_SHARES)
        limits = 8, most, refine * most, num_finalists(refine) * most, most, *likely
        self.limits = torch.tensor(limits, dtype=torch.int32, device=device)
        local = torch.randn(2, 1, KV_HEADS, 4 + RING, DIM, device=device).to(DTYPE)
        valid = torch.ones(1, 4 + RING, dtype=torch.bool, device=device)
        self.steady = StepSteady(local[0], local[1], valid)
        self.query = torch.randn(1, KV_HEADS * GROUP, DIM, device=device).to(DTYPE)
        self.new = torch.randn(1, KV_HEADS, DIM, device=device).to(DTYPE)
        self.valid = torch.ones(1, dtype=torch.bool, device=device)

    def _arena(self, data: Tensor) -> StepArena:
        size = data.shape[0] * data.shape[1], *self.layout.stored_shape
        host = torch.empty(size, dtype=self.layout.stored_dtype, pin_memory=True)
        for some, place in zip(data.flatten(0, 1).split(CHUNK), host.split(CHUNK), strict=True):
            place.copy_(self.layout.encode(some))
        return StepArena(torch.tensor([host.data_ptr()], device=data.device), len(host), [host])

    def runs(self) -> dict[str, Run]:
        """The kernels in the order of a step: each finds what those before it left."""
        index, scratch, shape = self.pages.summary, self.scratch, self.shape
        most, rows = shape.most, shape.rows
        moments = index.counts, index.variance
        chosen_bytes = rows * (most * 28 + shape.slots * 4)
        return {
            "score": Run(
                self._score,
                lambda: nbytes(
                    *(*moments, index.mean, index.mean_step, index.block_mean),
                    *(index.block_mean_scale, scratch.block_logits),
                    *(scratch.log_mass, scratch.status),
                ),
            ),
            "rank for candidates": self._rank(FIRST, *moments),
            "refine by high planes": self._refine(
                FIRST, index.high, index.key_step, *moments, scratch.shift
            ),
            "rank for finalists": self._rank(SECOND, scratch.status),
            "refine by both planes": self._refine(
                *(SECOND, index.high, index.low, index.key_step, index.mean, index.mean_step),
                *(index.counts, scratch.shift),
            ),
            "rank": self._rank(FINAL),
            "select": Run(
                lambda: cuda.select(self.counters, self.limits, scratch, shape),
                lambda: nbytes(scratch.rank, scratch.chosen),
            ),
            "resolve, all missing": Run(self._resolve, lambda: chosen_bytes, self._empty_pool),
            "fetch, all missing": Run(self._fetch, lambda: rows * most * self.layout.page_bytes),
            "resolve, none missing": Run(self._resolve, lambda: chosen_bytes, self._next_step),
            "resolve, a tenth missing": Run(self._resolve, lambda: chosen_bytes, self._evict),
            "settle": Run(
                lambda: cuda.settle(self.pool, self.counters, shape),
                lambda: nbytes(self.pool.order, self.pool.order, self.pool.age),
            ),
            "fetch, a tenth missing": Run(
                self._fetch, lambda: int(scratch.num_misses.sum()) * self.layout.page_bytes
            ),
            "attend steady": Run(lambda: self._attend(pages=False), lambda: rows * LOCAL * 4 * DIM),
            "attend pages": Run(
                lambda: self._attend(pages=True), lambda: rows * most * self.layout.dense_bytes
            ),
            "value_slope": Run(
                lambda: cuda.value_slope(self.query, self.pages, self.counters, scratch, shape),
                lambda: nbytes(self.pages.scatter),
            ),
            "estimate": Run(
                lambda: cuda.estimate(self.pages, self.counters, scratch, shape),
                lambda: (
                    nbytes(*moments, index.block_value, index.block_value_scale)
                    + nbytes(scratch.log_mass, scratch.status, scratch.slope, scratch.part_out)
                    + self._share(scratch.status == REFINED)
                    * nbytes(index.value, index.value_step, scratch.shift)
                ),
            ),
            "merge": Run(
                lambda: cuda.merge(self.counters, scratch, self.totals, None, shape),
                lambda: nbytes(scratch.part_out, scratch.part_lse),
            ),
        }

    @staticmethod
    def _share(is_one: Tensor) -> float:
        return float(is_one.float().mean())

    def _score(self) -> None:
        new = self.new, self.new, self.valid
        places = self.steady, self.pages, self.counters, self.scratch, self.shape
        cuda.score(self.query, *new, *places)

    def _rank(self, stage: int, *read: Tensor) -> Run:
        scratch = self.scratch

        def run() -> None:
            cuda.rank_pages(
                self.pages, self.counters, self.limits, scratch, self.shape, stage=stage
            )

        def before() -> None:
            # `score` does these in a step
            scratch.histogram[stage].zero_()
            scratch.arrived[stage].zero_()

        return Run(run, lambda: nbytes(scratch.log_mass, scratch.rank, *read), before)

    def _refine(self, stage: int, *of_candidates: Tensor) -> Run:
        """A candidate's log masses are written again; all are summed."""
        scratch = self.scratch
        kept: list[Tensor] = []

        def run() -> None:
            cuda.refine(self.pages, self.counters, scratch, self.shape, stage=stage)

        def before() -> None:
            if not kept:
                kept.append(scratch.log_mass.clone())
            scratch.log_mass.copy_(kept[0])

        def num_bytes() -> float:
            share = self._share(scratch.rank >= scratch.threshold[stage].unsqueeze(-1))
            some = nbytes(*of_candidates, scratch.log_mass)
            return share * some + nbytes(scratch.rank, scratch.log_mass)

        return Run(run, num_bytes, before)

    def _resolve(self) -> None:
        cuda.resolve(self.pages, self.pool, self.counters, self.scratch, self.totals, self.shape)

    def _fetch(self) -> None:
        cuda.fetch(self.arena, self.pool, self.scratch, self.shape)

    def _attend(self, *, pages: bool) -> None:
        places = self.steady, self.pool, self.counters, self.scratch, self.shape
        cuda.attend(self.query, *places, pages=pages)

    def _next_step(self) -> None:
        cuda.settle(self.pool, self.counters, self.shape)
        self.counters[:2] += 1

    def _empty_pool(self) -> None:
        self._next_step()
        for part in (self.pool.table, self.pool.owner, self.pool.age):
            part.fill_(-1)

    def _evict(self) -> None:
        """Every tenth chosen page is gone, its slot older than the others."""
        self._next_step()
        pages = self.scratch.chosen[..., ::10].clamp(min=0).long()
        slots = self.pool.table.gather(2, pages)
        is_there = slots >= 0
        self.pool.table.scatter_(2, pages, -1)
        at = slots.clamp(min=0).long()
        for part in (self.pool.owner, self.pool.age):
            part.scatter_(2, at, torch.where(is_there, -1, part.gather(2, at)))


def measure(context: int, refine: int, budget: float, host_dtype: str) -> dict[str, Any]:
    """Time every kernel at one context length."""
    bench = Bench(context, refine, budget, host_dtype)
    figures: dict[str, Any] = {}
    for name, run in bench.runs().items():
        ms = median_ms(run.run, run.before)
        num_bytes = run.num_bytes()
        figures[name] = {"ms": ms, "bytes": num_bytes, "GB/s": num_bytes / ms / 1e6}
    if not bench.scratch.out.isfinite().all():
        raise RuntimeError(f"the output at {context} tokens is not finite")
    settings = {"refine": refine, "budget": budget, "host_dtype": host_dtype}
    return {"context": context, **settings, "kernels": figures}


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[131072, 1048576])
    parser.add_argument("--budget", type=float, default=0.02)
    parser.add_argument("--refine", type=int, default=12)
    parser.add_argument("--host-dtype", default="model", choices=("model", *CODEC_BITS))
    parser.add_argument("--json", type=Path, default=Path("bench/results/decode_kernels.json"))
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"device copy {bandwidth:.0f} GB/s")
    results = []
    for context in arguments.contexts:
        result = measure(context, arguments.refine, arguments.budget, arguments.host_dtype)
        results.append(result)
        for name, figure in result["kernels"].items():
            print(
                f"{context:8d} {name:26s} {figure['ms'] * 1e3:8.1f} us {figure['GB/s']:8.0f} GB/s "
                f"{figure['GB/s'] / bandwidth:6.1%}",
                flush=True,
            )
    record = {"machine": machine_record(), "copy_GB/s": bandwidth, "results": results}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
