"""Exact attention of one query to pages in the pool and to the steady zone, split over both, and
the merge of all states."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavekv.kernels.cuda.launch import launch, power_of_two
from wavekv.kernels.step import (
    ATTEND_TOKENS,
    StepPool,
    StepScratch,
    StepShape,
    StepSteady,
    StepTotals,
)

_MERGE_DIMS = 32
_MERGE_PARTS = 256


@triton.jit
def _attention_state(q, keys, values, is_held, scale, softcap, SOFTCAP, PRECISION):
    """out [GP, DP] and lse [GP] of queries [GP, DP] over keys, values [T, DP]."""
    logits = tl.dot(q.to(keys.dtype), tl.trans(keys), input_precision=PRECISION) * scale
    if SOFTCAP:
        logits = softcap * (2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0)
    logits = tl.where(is_held[None, :], logits, float("-inf"))
    largest = tl.max(logits, 1)
    safe = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp(logits - safe[:, None])
    total = tl.sum(weights, 1)
    out = tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
    out = out / tl.maximum(total, 1e-30)[:, None]
    return out, tl.where(total > 0.0, safe + tl.log(tl.maximum(total, 1e-30)), float("-inf"))


@triton.jit
def _attend(
    query,
    counters,
    slots,
    tokens,
    pages,
    steady_keys,
    steady_values,
    steady_valid,
    part_out,
    part_lse,
    S,
    M,
    scale,
    softcap,
    H: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    P: tl.constexpr,
    PP: tl.constexpr,
    SINKS: tl.constexpr,
    RING: tl.constexpr,
    FIRST: tl.constexpr,
    PAGE_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    PAGES: tl.constexpr,
    TOKENS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part, row = tl.program_id(0) + FIRST, tl.program_id(1).to(tl.int64)
    g, d = tl.arange(0, GP), tl.arange(0, DP)
    is_head, is_dim = g < G, d < D
    at_head = (row * G + g)[:, None] * D + d[None, :]
    q = tl.load(query + at_head, mask=is_head[:, None] & is_dim[None, :], other=0.0)
    if part < PAGE_PARTS:
        t = tl.arange(0, PAGES * PP)
        j, p = part * PAGES + t // PP, t % PP
        slot = tl.load(slots + row * M + j, mask=j < M, other=-1).to(tl.int64)
        count = tl.load(tokens + row * M + j, mask=j < M, other=0)
        is_held = (slot >= 0) & (p < count)
        at = ((row * S + slot) * (2 * P) + p)[:, None] * D + d[None, :]
        inside = is_held[:, None] & is_dim[None, :]
        keys = tl.load(pages + at, mask=inside, other=0.0)
        values = tl.load(pages + at + P * D, mask=inside, other=0.0)
        out, lse = _attention_state(q, keys, values, is_held, scale, softcap, SOFTCAP, PRECISION)
    else:
        i = (part - PAGE_PARTS) * TOKENS + tl.arange(0, TOKENS)
        end, start = tl.load(counters), tl.load(counters + 3)
        # the position of the token in a ring slot, were it in use
        position = start + (i - SINKS - start % RING + RING) % RING
        is_slot = i < SINKS + RING
        valid = tl.load(steady_valid + (row // H) * (SINKS + RING) + i, mask=is_slot, other=0)
        is_live = is_slot & ((i < SINKS) | (position <= end)) & (valid != 0)
        at_token = (row * (SINKS + RING) + i)[:, None] * D + d[None, :]
        in_zone = is_live[:, None] & is_dim[None, :]
        local_keys = tl.load(steady_keys + at_token, mask=in_zone, other=0.0)
        local_values = tl.load(steady_values + at_token, mask=in_zone, other=0.0)
        out, lse = _attention_state(
            q, local_keys, local_values, is_live, scale, softcap, SOFTCAP, PRECISION
        )
    to = (row * G + g) * PARTS + part
    tl.store(part_lse + to, lse, mask=is_head)
    tl.store(part_out + to[:, None] * D + d[None, :], out, mask=is_head[:, None] & is_dim[None, :])


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
    """The states of the chosen pages in the pool (`pages`), or of the steady zone, as parts of
    `scratch.part_out`."""
    first = 0 if pages else shape.page_parts
    count = shape.page_parts if pages else shape.attend_parts - shape.page_parts
    page_size = power_of_two(shape.page_size)
    options: dict[str, Any] = {
        "H": shape.kv_heads,
        "G": shape.group,
        "GP": max(16, power_of_two(shape.group)),
        "D": shape.head_dim,
        "DP": max(16, power_of_two(shape.head_dim)),
        "P": shape.page_size,
        "PP": page_size,
        "SINKS": shape.sinks,
        "RING": shape.ring,
        "FIRST": first,
        "PAGE_PARTS": shape.page_parts,
        "PARTS": scratch.part_lse.shape[2],
        "PAGES": shape.attend_pages,
        "TOKENS": ATTEND_TOKENS,
        "SOFTCAP": shape.softcap is not None,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "num_warps": 4,
    }
    launch(
        _attend,
        (count, shape.rows),
        *(query, counters, scratch.slots, scratch.tokens, pool.pages),
        *(steady.keys, steady.values, steady.valid),
        *(scratch.part_out, scratch.part_lse),
        *(shape.slots, shape.most, shape.scale, shape.softcap or 1.0),
        **options,
    )


@triton.jit
def _merge(
    counters,
    part_out,
    part_lse,
    sinks,
    out,
    tail_mass,
    HQ: tl.constexpr,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    ATTEND_PARTS: tl.constexpr,
    ESTIMATE_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_P: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    USE_TAIL: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    num_pages = tl.load(counters + 2)
    num_parts = ATTEND_PARTS + tl.cdiv(num_pages, ESTIMATE_BLOCK)
    i, d = tl.arange(0, PARTS_P), tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    lse = tl.load(part_lse + head * PARTS + i, mask=i < num_parts, other=float("-inf"))
    largest = tl.max(lse, 0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp(lse - largest)
    tail = tl.sum(tl.where(i >= ATTEND_PARTS, weights, 0.0), 0)
    everything = tl.sum(weights, 0)
    share = tl.where(everything > 0.0, tail / tl.maximum(everything, 1e-30), 0.0)
    if tl.program_id(1) == 0:
        tl.store(tail_mass + head, tl.load(tail_mass + head) + share)
    if not USE_TAIL:
        num_parts = ATTEND_PARTS
        everything -= tail
    if HAS_SINKS:
        everything += tl.exp(tl.load(sinks + head % HQ).to(tl.float32) - largest)
    total = tl.zeros([DIMS], tl.float32)
    start = 0
    while start < num_parts:
        k = start + tl.arange(0, BLOCK)
        weight = tl.load(part_lse + head * PARTS + k, mask=k < num_parts, other=float("-inf"))
        weight = tl.exp(weight - largest)
        part = tl.load(
            part_out + (head * PARTS + k)[:, None] * D + d[None, :],
            mask=(k < num_parts)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        total += tl.sum(part * weight[:, None], 0)
        start += BLOCK
    total = tl.where(everything > 0.0, total / tl.maximum(everything, 1e-30), 0.0)
    tl.store(out + head * D + d, total, mask=d < D)


def merge(
    counters: Tensor,
    scratch: StepScratch,
    totals: StepTotals,
    sinks: Tensor | None,
    shape: StepShape,
) -> None:
    """Join all states into `scratch.out`. sinks: [Hq] logits of learned attention sinks, or
    None."""
    parts = scratch.part_lse.shape[2]
    options: dict[str, Any] = {
        "HQ": shape.kv_heads * shape.group,
        "D": shape.head_dim,
        "DIMS": _MERGE_DIMS,
        "ATTEND_PARTS": shape.attend_parts,
        "ESTIMATE_BLOCK": shape.estimate_block,
        "PARTS": parts,
        "PARTS_P": power_of_two(parts),
        "BLOCK": min(power_of_two(parts), _MERGE_PARTS),
        "HAS_SINKS": sinks is not None,
        "USE_TAIL": shape.tail != "none",
        "num_warps": 8,
    }
    launch(
        _merge,
        (shape.rows * shape.group, triton.cdiv(shape.head_dim, _MERGE_DIMS)),
        *(counters, scratch.part_out, scratch.part_lse, sinks, scratch.out, totals.tail_mass),
        **options,
    )
