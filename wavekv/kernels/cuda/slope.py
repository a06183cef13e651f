"""How values go with logits: see `wavekv.kernels.value_slope`."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavekv.kernels.cuda.launch import launch, power_of_two
from wavekv.kernels.reference import VALUE_RIDGE
from wavekv.kernels.step import SLOPE_ROWS, StepPages, StepScratch, StepShape


@triton.jit
def _value_slope(
    query,
    counters,
    scatter,
    slope,
    slope_spread,
    spans,
    scale,
    ridge,
    SPAN_PAGES: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    SPANS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    span, block = part // PARTS, part % PARTS
    if span * SPAN_PAGES < tl.load(counters + 2):
        g, d, r = tl.arange(0, GP), tl.arange(0, DP), block * ROWS + tl.arange(0, ROWS)
        of_span = scatter + (row * spans + span) * (2 * D * D)
        # transposed: a row of it goes to a column of the product
        at = of_span + r[None, :] * D + d[:, None]
        inside = (r < D)[None, :] & (d < D)[:, None]
        keys = tl.load(at, mask=inside, other=0.0).to(DTYPE)
        values = tl.load(at + D * D, mask=inside, other=0.0).to(DTYPE)
        diagonal = tl.load(of_span + r * D + r, mask=r < D, other=0.0).to(tl.float32)
        of_head, is_head = (row * G + g)[:, None], (g < G)[:, None]
        here = query + of_head * D
        q = tl.load(here + d[None, :], mask=is_head & (d < D)[None, :], other=0.0).to(DTYPE)
        qr = tl.load(here + r[None, :], mask=is_head & (r < D)[None, :], other=0.0)
        qr = qr.to(tl.float32) * scale
        by_keys = tl.dot(q, keys, input_precision="ieee") * scale
        by_values = tl.dot(q, values, input_precision="ieee") * scale
        spread = tl.sum(by_keys * qr + ridge * diagonal[None, :] * qr * qr, 1)
        to = (row * G + g) * SPANS + span
        tl.store(slope_spread + to * PARTS + block, spread, mask=g < G)
        to = slope + to[:, None] * D + r[None, :]
        tl.store(to, by_values, mask=is_head & (r < D)[None, :])


def value_slope(
    query: Tensor, pages: StepPages, counters: Tensor, scratch: StepScratch, shape: StepShape
) -> None:
    """How values go with logits in each span: see `wavekv.kernels.value_slope`. The quotient is
    left to `estimate`."""
    spans, parts = scratch.slope_spread.shape[2:]
    options: dict[str, Any] = {
        "SPAN_PAGES": shape.span_pages,
        "G": shape.group,
        # what a product has at least
        "GP": max(16, power_of_two(shape.group)),
        "D": shape.head_dim,
        "DP": max(16, power_of_two(shape.head_dim)),
        "ROWS": SLOPE_ROWS,
        "PARTS": parts,
        "SPANS": spans,
        # other queries are not those numbers
        "DTYPE": tl.bfloat16 if query.dtype == torch.bfloat16 else tl.float32,
        "num_warps": 4,
    }
    launch(
        _value_slope,
        (spans * parts, shape.rows),
        *(query, counters, pages.scatter, scratch.slope, scratch.slope_spread),
        *(pages.scatter.shape[2], shape.scale, VALUE_RIDGE),
        **options,
    )
