"""Each kernel of the decode step by itself: time, and bytes over the time, beside a device copy.

    python bench/decode_kernels.py --contexts 131072 524288

The layer is that of Llama-3.1-8B (Hq 32, Hkv 8, D 128, bfloat16), pages of 8 tokens, random keys.
Bytes are those that the kernel cannot avoid: what it reads and writes of pages, statistics, codes
and scatter, without its working memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from index_parts import BLOCKS, CANDIDATE, FINALIST, RANKING, index_page_bytes
from machine import machine_record
from torch import Tensor

from wavekv.index import page_scatter
from wavekv.index.levels import BLOCK_PAGES, index_of_pages, num_finalists
from wavekv.kernels import cuda
from wavekv.kernels.page_index import PageIndex
from wavekv.kernels.step import (
    FINAL,
    FIRST,
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

KV_HEADS, GROUP, DIM, PAGE, SPAN = 8, 4, 128, 8, 1024
DTYPE = torch.bfloat16
CHUNK = 1 << 16
"""Pages that are encoded at once."""


def random_pages(num_pages: int, device: torch.device, seed: int = 0) -> tuple[StepPages, Tensor]:
    """Statistics and codes of random pages, and the pages [Hkv, N, 2, P, D]."""
    random = torch.Generator(device).manual_seed(seed)
    parts: list[tuple[Tensor, ...]] = []
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
        scatter = page_scatter(keys, values, here).unsqueeze(1)
        parts.append((*index_of_pages(keys, values, here, BLOCK_PAGES), scatter))
        pages[:, first : first + n] = torch.stack([keys, values], 2)
    *summary, scatters = (torch.cat(part, 1)[None] for part in zip(*parts, strict=True))
    ids = torch.arange(KV_HEADS * num_pages, device=device).view(1, KV_HEADS, num_pages)
    return StepPages(PageIndex._make(summary), scatters, ids), pages


def median_ms(run: Callable[[], None], repeats: int = 20) -> float:
    """Median of replays of a graph of one call, in ms, with the L2 cache emptied before each."""
    # read, not written: lines to be written back would share the bandwidth with what is timed
    flush = torch.zeros(64 << 20, dtype=torch.float32, device="cuda")
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats):
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


def measure(context: int, refine: int, budget: float, host_dtype: str) -> dict[str, Any]:
    """Time every kernel at one context length."""
    device = torch.device("cuda")
    layout = KVLayout(PAGE, DIM, DTYPE, host_dtype)
    N = context // PAGE
    most = max(1, int(budget * N))
    slots, ring = 3 * most, 576
    shape = StepShape(
        batch=1,
        kv_heads=KV_HEADS,
        group=GROUP,
        head_dim=DIM,
        page_size=PAGE,
        capacity=N,
        most=most,
        slots=slots,
        misses=most,
        sinks=4,
        ring=ring,
        span_pages=SPAN,
        block_pages=BLOCK_PAGES,
        scale=DIM**-0.5,
        codec=layout.codec,
    )
    pages, data = random_pages(N, device)
    host = torch.empty(
        (KV_HEADS * N, *layout.stored_shape), dtype=layout.stored_dtype, pin_memory=True
    )
    for some, place in zip(data.flatten(0, 1).split(CHUNK), host.split(CHUNK), strict=True):
        place.copy_(layout.encode(some))
    del data, some
    arena = StepArena(torch.tensor([host.data_ptr()], device=device), len(host), [host])
    pool, scratch = empty_pool(shape, DTYPE, device), empty_scratch(shape, DTYPE, device)
    totals = empty_totals(shape, device)
    counters = torch.tensor([context, 1, N, context - 300], dtype=torch.int32, device=device)
    finalists = num_finalists(refine) * most
    values = [8, most, refine * most, finalists, most]
    limits = torch.tensor(values, dtype=torch.int32, device=device)
    local = torch.randn(2, 1, KV_HEADS, 4 + ring, DIM, device=device).to(DTYPE)
    valid = torch.ones(1, 4 + ring, dtype=torch.bool, device=device)
    steady = StepSteady(local[0], local[1], valid)
    query = torch.randn(1, KV_HEADS * GROUP, DIM, device=device).to(DTYPE)
    new = torch.randn(1, KV_HEADS, DIM, device=device).to(DTYPE)
    one = torch.ones(1, dtype=torch.bool, device=device)

    def resolve_anew() -> None:
        counters[:2] += 1
        pool.table.fill_(-1)
        pool.owner.fill_(-1)
        pool.age.fill_(-1)
        cuda.resolve(pages, pool, counters, scratch, totals, shape)

    def rank(stage: int) -> None:
        # `score` does these in a step
        scratch.histogram.zero_()
        scratch.arrived.zero_()
        cuda.rank_pages(pages, counters, limits, scratch, shape, stage=stage)

    candidates = min(N, refine * most) if refine > 1 and most < N else 0
    finalists = min(N, finalists) if candidates else 0
    ranking, candidate, finalist, blocks = (
        index_page_bytes(pages.summary, names) for names in (RANKING, CANDIDATE, FINALIST, BLOCKS)
    )
    own_value = index_page_bytes(pages.summary, ("value", "value_step"))

    def refined(number: int, each: float) -> int:
        # the mean key and the count again; log mass and shift are written, and all masses are read
        again = index_page_bytes(pages.summary, ("mean", "mean_step", "counts"))
        return round(KV_HEADS * (number * (each + again + 8 * GROUP) + N * (4 + 4 * GROUP)))

    runs: dict[str, tuple[Callable[[], None], int]] = {
        "score": (
            lambda: cuda.score(query, new, new, one, steady, pages, counters, scratch, shape),
            round(KV_HEADS * N * (ranking + 4 * GROUP)),
        ),
        "rank candidates": (
            lambda: rank(FIRST),
            KV_HEADS * N * (4 * GROUP + 6),
        ),
        "refine candidates": (
            lambda: cuda.refine(pages, counters, scratch, shape, stage=FIRST),
            refined(candidates, candidate - own_value),
        ),
        "rank finalists": (lambda: rank(SECOND), KV_HEADS * N * (4 * GROUP + 4)),
        "refine finalists": (
            lambda: cuda.refine(pages, counters, scratch, shape, stage=SECOND),
            refined(finalists, finalist),
        ),
        "rank": (lambda: rank(FINAL), KV_HEADS * N * (4 * GROUP + 4)),
        "select": (lambda: cuda.select(counters, limits, scratch, shape), KV_HEADS * N * 9),
        "resolve": (
            lambda: cuda.resolve(pages, pool, counters, scratch, totals, shape),
            KV_HEADS * (most * 28 + slots * 4),
        ),
        "resolve all misses (with resets)": (resolve_anew, KV_HEADS * (most * 28 + slots * 4)),
        "fetch": (
            lambda: cuda.fetch(arena, pool, scratch, shape),
            KV_HEADS * most * layout.page_bytes,
        ),
        "attend steady": (
            lambda: cuda.attend(query, steady, pool, counters, scratch, shape, pages=False),
            KV_HEADS * 300 * 4 * DIM,
        ),
        "attend pages": (
            lambda: cuda.attend(query, steady, pool, counters, scratch, shape, pages=True),
            KV_HEADS * most * layout.dense_bytes,
        ),
        "value_slope": (
            lambda: cuda.value_slope(query, pages, counters, scratch, shape),
            KV_HEADS * pages.scatter.shape[2] * 8 * DIM * DIM,
        ),
        "estimate": (
            lambda: cuda.estimate(pages, counters, scratch, shape),
            round(KV_HEADS * (N * (blocks + 3 + 4 * GROUP) + candidates * own_value)),
        ),
        "merge": (lambda: cuda.merge(counters, scratch, totals, None, shape), 0),
    }
    figures: dict[str, Any] = {}
    for name, (run, num_bytes) in runs.items():
        if name == "fetch":
            resolve_anew()
        ms = median_ms(run)
        if name == "fetch":
            found = pool.pages.flatten(1, 2)[0].isfinite().all()
            assert found
            assert int(scratch.num_misses.sum()) == KV_HEADS * most, scratch.num_misses
        figures[name] = {"ms": ms, "bytes": num_bytes, "GB/s": num_bytes / ms / 1e6}
    settings = {"refine": refine, "budget": budget, "host_dtype": host_dtype}
    return {"context": context, **settings, "kernels": figures}


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[131072, 524288])
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
                f"{context:8d} {name:34s} {figure['ms'] * 1e3:8.1f} us {figure['GB/s']:8.0f} GB/s "
                f"{figure['GB/s'] / bandwidth:6.1%}",
                flush=True,
            )
    record = {"machine": machine_record(), "copy_GB/s": bandwidth, "results": results}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
