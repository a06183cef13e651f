"""The query against the mean key of every page."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavekv.kernels.cuda.integers import signed_floats
from wavekv.kernels.cuda.launch import launch, power_of_two, uses_hardware
from wavekv.kernels.cuda.moments import moments, softmax_sum
from wavekv.kernels.step import NUM_BINS, SCORE_BLOCK, StepPages, StepScratch, StepShape, StepSteady

_HEADS = 8
"""The least number of query heads in a product."""
_WARPS = 4


@triton.jit
def _quantise(
    query, words, steps, head, scale, D: tl.constexpr, GROUPS: tl.constexpr, GROUPS_P: tl.constexpr
):
    """Round one head's query to int8, as the codes want it."""
    w, i = tl.arange(0, GROUPS_P)[:, None], tl.arange(0, 4)[None, :]
    low, high = 4 * w + i, 4 * (GROUPS + w) + i
    in_low, in_high = (w < GROUPS) & (low < D), (w < GROUPS) & (high < D)
    first = tl.load(query + head * D + low, mask=in_low, other=0.0).to(tl.float32)
    second = tl.load(query + head * D + high, mask=in_high, other=0.0).to(tl.float32)
    largest = tl.max(tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1)), 0)
    safe = tl.where(largest == 0.0, 1.0, largest)
    first = tl.floor(first / safe * 127.0 + 0.5).to(tl.int32)
    second = tl.floor(second / safe * 127.0 + 0.5).to(tl.int32)
    at = words + head * 2 * GROUPS + tl.arange(0, GROUPS_P)
    inside = tl.arange(0, GROUPS_P) < GROUPS
    tl.store(at, tl.sum((first & 255) << (8 * i), 1), mask=inside)
    tl.store(at + GROUPS, tl.sum((second & 255) << (8 * i), 1), mask=inside)
    tl.store(steps + head * 2, largest / 127.0 * scale)
    tl.store(steps + head * 2 + 1, tl.sum(tl.sum(first + second, 1), 0).to(tl.float32))


@triton.jit
def _score(
    query,
    new_keys,
    new_values,
    new_valid,
    counters,
    counts,
    mean,
    mean_scale,
    variance,
    steady_keys,
    steady_values,
    steady_valid,
    mean_logits,
    log_mass,
    shift,
    query_words,
    query_step,
    block_max,
    block_sum,
    histogram,
    arrived,
    N,
    scale,
    softcap,
    SINKS: tl.constexpr,
    RING: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    BINS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_P: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    USE_VARIANCE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    HARDWARE: tl.constexpr,
    APPEND: tl.constexpr,
):
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    g, d = tl.arange(0, GP), tl.arange(0, DP)
    is_head, in_head = g < G, (g < G)[:, None] & (d < D)[None, :]
    num_pages = tl.load(counters + 2)
    if block == 0:
        # the first block of each row also does what has to be done once
        bins = tl.arange(0, BINS)
        for part in tl.static_range(2):
            tl.store(histogram + (part * ROWS + row) * BINS + bins, tl.zeros([BINS], tl.int32))
            tl.store(arrived + part * ROWS + row, 0)
        for head in tl.static_range(G):
            _quantise(query, query_words, query_step, row * G + head, scale, D, GROUPS, GROUPS_P)
        if APPEND:
            end = tl.load(counters)
            slot = row * (SINKS + RING) + SINKS + end % RING
            key = tl.load(new_keys + row * D + d, mask=d < D, other=0.0)
            value = tl.load(new_values + row * D + d, mask=d < D, other=0.0)
            tl.store(steady_keys + slot * D + d, key, mask=d < D)
            tl.store(steady_values + slot * D + d, value, mask=d < D)
            if row % H == 0:
                is_valid = tl.load(new_valid + row // H)
                tl.store(steady_valid + (row // H) * (SINKS + RING) + SINKS + end % RING, is_valid)
    if block * BLOCK < num_pages:
        q = tl.load(query + (row * G + g)[:, None] * D + d[None, :], mask=in_head, other=0.0)
        scaled = q.to(tl.float32) * scale
        square = tl.sum(scaled * scaled, 1)
        n = block * BLOCK + tl.arange(0, BLOCK)
        is_page = n < num_pages
        means = tl.load(
            mean + (row * N + n)[:, None] * D + d[None, :],
            mask=is_page[:, None] & (d < D)[None, :],
            other=0,
        )
        step = tl.load(mean_scale + row * N + n, mask=is_page, other=0.0) * scale
        count = tl.load(counts + row * N + n, mask=is_page, other=0)
        spread = tl.load(variance + row * N + n, mask=is_page, other=0.0)
        means = signed_floats(means, q.dtype, HARDWARE)
        x = tl.dot(means, tl.trans(q), input_precision=PRECISION)
        x = tl.trans(x) * step[None, :]
        mass, lean = moments(x, square, spread, count, softcap, USE_VARIANCE, SOFTCAP, HARDWARE)
        out = (row * G + g)[:, None] * N + n[None, :]
        keep = is_head[:, None] & is_page[None, :]
        tl.store(mean_logits + out, x, mask=keep)
        tl.store(log_mass + out, mass, mask=keep)
        tl.store(shift + out, lean, mask=keep)
        largest, total = softmax_sum(tl.where(is_page[None, :], mass + lean, float("-inf")))
        at = (row * G + g) * STRIDE + block
        tl.store(block_max + at, largest, mask=is_head)
        tl.store(block_sum + at, total, mask=is_head)


def score(
    query: Tensor,
    new_keys: Tensor | None,
    new_values: Tensor | None,
    new_valid: Tensor | None,
    steady: StepSteady,
    pages: StepPages,
    counters: Tensor,
    scratch: StepScratch,
    shape: StepShape,
) -> None:
    """Log mass and shift of all pages by their moments, with the softmax statistics of their sum;
    put the new token (if there is one) into the ring. query: [B, Hq, D]; new_keys, new_values: [B,
    Hkv, D]; new_valid: [B] bool."""
    is_float32 = query.dtype == torch.float32
    options: dict[str, Any] = {
        "SINKS": shape.sinks,
        "RING": shape.ring,
        "H": shape.kv_heads,
        "G": shape.group,
        "GP": max(_HEADS, power_of_two(shape.group)),
        "D": shape.head_dim,
        "DP": max(16, power_of_two(shape.head_dim)),
        "ROWS": shape.rows,
        "BINS": NUM_BINS,
        "GROUPS": scratch.query_words.shape[3],
        "GROUPS_P": power_of_two(scratch.query_words.shape[3]),
        "BLOCK": SCORE_BLOCK,
        "STRIDE": scratch.block_max.shape[2],
        "USE_VARIANCE": shape.tail == "second",
        "SOFTCAP": shape.softcap is not None,
        "PRECISION": "ieee" if is_float32 else "tf32",
        "HARDWARE": uses_hardware(query),
        "APPEND": new_keys is not None,
        "num_warps": _WARPS,
    }
    launch(
        _score,
        (triton.cdiv(shape.capacity, SCORE_BLOCK), shape.rows),
        *(query, new_keys, new_values, new_valid, counters),
        *(pages.counts, pages.mean, pages.mean_scale, pages.variance),
        *(steady.keys, steady.values, steady.valid),
        *(scratch.mean_logits, scratch.log_mass, scratch.shift),
        *(scratch.query_words, scratch.query_step),
        *(scratch.block_max, scratch.block_sum),
        *(scratch.histogram, scratch.arrived),
        *(shape.capacity, shape.scale, shape.softcap or 1.0),
        **options,
    )
