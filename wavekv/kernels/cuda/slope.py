"""How values go with logits: see `wavekv.kernels.value_slope`."""

from typing import Any

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
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    SPANS: tl.constexpr,
):
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    span, block = part // PARTS, part % PARTS
    if span * SPAN_PAGES < tl.load(counters + 2):
        d, r = tl.arange(0, DP), block * ROWS + tl.arange(0, ROWS)
        at = scatter + (row * spans + span) * (2 * D * D) + r[:, None] * D + d[None, :]
        inside = (r < D)[:, None] & (d < D)[None, :]
        keys = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(at + D * D, mask=inside, other=0.0).to(tl.float32)
        diagonal = tl.sum(tl.where(d[None, :] == r[:, None], keys, 0.0), 1)
        for head in tl.static_range(G):
            here = query + (row * G + head) * D
            q = tl.load(here + d, mask=d < D, other=0.0).to(tl.float32) * scale
            qr = tl.load(here + r, mask=r < D, other=0.0).to(tl.float32) * scale
            spread = tl.sum(tl.sum(keys * q[None, :], 1) * qr + ridge * diagonal * qr * qr, 0)
            to = (row * G + head) * SPANS + span
            tl.store(slope_spread + to * PARTS + block, spread)
            tl.store(slope + to * D + r, tl.sum(values * q[None, :], 1), mask=r < D)


def value_slope(
    query: Tensor, pages: StepPages, counters: Tensor, scratch: StepScratch, shape: StepShape
) -> None:
    """How values go with logits in each span: see `wavekv.kernels.value_slope`. The quotient is
    left to `estimate`."""
    spans, parts = scratch.slope_spread.shape[2:]
    options: dict[str, Any] = {
        "SPAN_PAGES": shape.span_pages,
        "G": shape.group,
        "D": shape.head_dim,
        "DP": power_of_two(shape.head_dim),
        "ROWS": SLOPE_ROWS,
        "PARTS": parts,
        "SPANS": spans,
        "num_warps": 4,
    }
    launch(
        _value_slope,
        (spans * parts, shape.rows),
        *(query, counters, pages.scatter, scratch.slope, scratch.slope_spread),
        *(pages.scatter.shape[2], shape.scale, VALUE_RIDGE),
        **options,
    )
