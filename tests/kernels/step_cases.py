"""Random decode steps for the tests of the step kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wavekv.index import page_scatter
from wavekv.index.levels import index_of_pages
from wavekv.kernels.page_codec import PageCodec, encode_pages
from wavekv.kernels.page_index import PageIndex
from wavekv.kernels.step import (
    FINAL,
    FIRST,
    SECOND,
    StepArena,
    StepPages,
    StepPool,
    StepScratch,
    StepShape,
    StepSteady,
    StepTotals,
    empty_pool,
    empty_scratch,
    empty_totals,
)


@dataclass
class Case:
    """One layer's step, ready to run."""

    shape: StepShape
    query: Tensor
    new_keys: Tensor
    new_values: Tensor
    new_valid: Tensor
    steady: StepSteady
    pages: StepPages
    pool: StepPool
    arena: StepArena
    counters: Tensor
    limits: Tensor
    scratch: StepScratch
    totals: StepTotals
    keys: Tensor
    """[B, Hkv, N, P, D] of all pages, with `values` what the arena holds."""
    values: Tensor


def make_case(
    seed: int = 0,
    *,
    batch: int = 1,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 64,
    page_size: int = 8,
    num_pages: int = 200,
    capacity: int = 256,
    most: int = 14,
    least: int = 4,
    candidates: int = 36,
    finalists: int = 18,
    slots: int = 36,
    misses: int = 14,
    sinks: int = 4,
    ring: int = 96,
    start: int = 1604,
    end: int = 1680,
    span_pages: int = 64,
    block_pages: int = 8,
    scale: float | None = None,
    softcap: float | None = None,
    top_p: float | None = None,
    tail: str = "second",
    bits: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    spread: float = 1.0,
) -> Case:
    """A step over random pages, of whole blocks: `num_pages` and `capacity` are rounded up to them.
    Some pages are short or empty, some ring slots are invalid;
    whatever must not be read is NaN. bits: the host stores keys and values as such integers."""
    random = torch.Generator().manual_seed(seed)
    num_pages, N = (-(-x // block_pages) * block_pages for x in (num_pages, capacity))
    B, H, P, D = batch, kv_heads, page_size, head_dim
    shape = StepShape(
        batch=B,
        kv_heads=H,
        group=group,
        head_dim=D,
        page_size=P,
        capacity=N,
        most=most,
        slots=slots,
        misses=misses,
        sinks=sinks,
        ring=ring,
        span_pages=span_pages,
        block_pages=block_pages,
        scale=D**-0.5 if scale is None else scale,
        softcap=softcap,
        top_p=top_p,
        tail=tail,
        codec=None if bits is None else PageCodec(P, D, *bits),
    )

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random)

    centres = normal(B, H, N, 1, D) * spread
    keys = (centres + 0.6 * normal(B, H, N, P, D)).to(dtype)
    values = (0.3 * keys.float() + normal(B, H, N, P, D)).to(dtype)
    counts = torch.full((B, H, N), P, dtype=torch.int32)
    odd = torch.rand(B, H, N, generator=random)
    counts[odd < 0.1] = 1
    counts[odd < 0.05] = 0
    counts[:, :, num_pages:] = 0
    held = torch.arange(P) < counts.unsqueeze(-1)
    keys = keys.masked_fill(~held.unsqueeze(-1), torch.nan)
    values = values.masked_fill(~held.unsqueeze(-1), torch.nan)
    flat = [x.flatten(0, 1) for x in (keys, values, counts)]
    summary = index_of_pages(*flat, block_pages)
    spans = -(-N // span_pages)
    scatter = torch.zeros(B * H, spans, 2, D, D, dtype=torch.bfloat16)
    for span in range(spans):
        part = slice(span * span_pages, (span + 1) * span_pages)
        scatter[:, span] = page_scatter(flat[0][:, part], flat[1][:, part], flat[2][:, part])
    # what lies beyond the pages in use, or belongs to an empty one, must not matter
    is_empty = flat[2] <= 0
    for part in (summary.variance, summary.mean_step, summary.value_step):
        part.masked_fill_(is_empty, 255)
    for part in (summary.key_step, summary.high, summary.low, summary.value):
        part[is_empty] = 255
    summary = PageIndex._make(_poisoned(part, num_pages * part.shape[1] // N) for part in summary)
    used_spans = -(-num_pages // span_pages)
    scatter[:, used_spans:] = torch.nan

    def of_heads(x: Tensor) -> Tensor:
        return x.reshape(B, H, *x.shape[1:]).contiguous()

    order = torch.randperm(B * H * N, generator=random)
    arena_ids = order.reshape(B, H, N)
    per_chunk = -(-B * H * N // 3)
    both = torch.stack([keys, values], 3).reshape(B * H * N, 2, P, D)
    if shape.codec is not None:
        both = encode_pages(both, flat[2].flatten(), shape.codec)
    memory = both.new_zeros(3, per_chunk, *both.shape[1:])
    memory.flatten(0, 1)[order] = both
    is_cuda = device != "cpu"
    chunks = [chunk.contiguous().pin_memory() if is_cuda else chunk for chunk in memory.unbind()]
    addresses = torch.tensor([chunk.data_ptr() for chunk in chunks])
    A, L = sinks, ring
    valid = torch.rand(B, A + L, generator=random) < 0.9
    positions = start + (torch.arange(L) - start) % L
    local = torch.where(positions < end, 1.0, torch.nan)[:, None]
    factor = torch.cat([torch.ones(A, 1), local])
    steady_keys = (normal(B, H, A + L, D) * factor).to(dtype)
    steady_values = (normal(B, H, A + L, D) * factor).to(dtype)
    target = torch.device(device)
    case = Case(
        shape,
        normal(B, H * group, D).to(dtype),
        normal(B, H, D).to(dtype),
        normal(B, H, D).to(dtype),
        torch.ones(B, dtype=torch.bool),
        StepSteady(steady_keys, steady_values, valid),
        StepPages(
            PageIndex._make(of_heads(part) for part in summary),
            of_heads(scatter),
            arena_ids,
        ),
        empty_pool(shape, dtype, target),
        StepArena(addresses, per_chunk, chunks),
        torch.tensor([end, 7, num_pages, start], dtype=torch.int32),
        torch.tensor(
            [least, most, candidates, finalists, most, most // 2, most], dtype=torch.int32
        ),
        empty_scratch(shape, dtype, target),
        empty_totals(shape, target),
        keys,
        values,
    )
    return case if device == "cpu" else _moved(case, target)


def _poisoned(part: Tensor, used: int) -> Tensor:
    """What lies beyond the pages in use is NaN, or large."""
    part[:, used:] = torch.nan if part.is_floating_point() else 77
    return part


def copied(case: Case) -> Case:
    """An independent case with the same tensors, but for the arena."""
    return _moved(case, case.query.device)


def _moved(case: Case, device: torch.device) -> Case:
    def move(x: object) -> object:
        if isinstance(x, Tensor):
            return x.to(device, copy=True)
        if isinstance(x, StepArena):
            return x._replace(chunks=x.chunks.to(device))
        if isinstance(x, tuple):
            return type(x)(*(move(part) for part in x))  # type: ignore[call-arg]
        return x

    names = Case.__dataclass_fields__
    return Case(**{name: move(getattr(case, name)) for name in names})  # type: ignore[arg-type]


def run_step(ops: object, case: Case, sinks: Tensor | None = None) -> Tensor:
    """All kernels of a step in order. Returns the output [B, Hq, D]."""
    c = case
    shape, scratch = c.shape, c.scratch
    ops.score(  # type: ignore[attr-defined]
        c.query,
        c.new_keys,
        c.new_values,
        c.new_valid,
        c.steady,
        c.pages,
        c.counters,
        scratch,
        shape,
    )
    for stage in FIRST, SECOND:
        ops.rank_pages(c.pages, c.counters, c.limits, scratch, shape, stage=stage)  # type: ignore[attr-defined]
        ops.refine(c.pages, c.counters, scratch, shape, stage=stage)  # type: ignore[attr-defined]
    ops.rank_pages(c.pages, c.counters, c.limits, scratch, shape, stage=FINAL)  # type: ignore[attr-defined]
    ops.select(c.counters, c.limits, scratch, shape)  # type: ignore[attr-defined]
    ops.resolve(c.pages, c.pool, c.counters, scratch, c.totals, shape)  # type: ignore[attr-defined]
    ops.fetch(c.arena, c.pool, scratch, shape)  # type: ignore[attr-defined]
    ops.attend(c.query, c.steady, c.pool, c.counters, scratch, shape, pages=False)  # type: ignore[attr-defined]
    if shape.tail == "second":
        ops.value_slope(c.query, c.pages, c.counters, scratch, shape)  # type: ignore[attr-defined]
    ops.estimate(c.pages, c.counters, scratch, shape)  # type: ignore[attr-defined]
    ops.attend(c.query, c.steady, c.pool, c.counters, scratch, shape, pages=True)  # type: ignore[attr-defined]
    ops.merge(c.counters, scratch, c.totals, sinks, shape)  # type: ignore[attr-defined]
    return scratch.out.clone()
