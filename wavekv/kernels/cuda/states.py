"""Merging the states of many queries, a block of keys at a time, in one pass over them."""

import triton
import triton.language as tl
from torch import Tensor

from wavekv.kernels.cuda.launch import launch, power_of_two

_TILE = 4096
"""Elements of an output that a program holds."""


@triton.jit
def _merge_into(
    out,
    lse,
    part,
    part_lse,
    H,
    T,
    stride_b,
    stride_h,
    stride_t,
    D: tl.constexpr,
    D_P: tl.constexpr,
    ROWS: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D_P)
    live = t < T
    inside = live[:, None] & (d < D)[None, :]
    row = head * T + t
    a = tl.load(lse + row, mask=live, other=-float("inf"))
    b = tl.load(part_lse + row, mask=live, other=-float("inf"))
    # few rows are held by several threads each: none may load what another has stored
    tl.debug_barrier()
    top = tl.maximum(a, b)
    # two empty states: nothing to subtract from
    top = tl.where(top == -float("inf"), 0.0, top)
    mass_a, mass_b = tl.exp(a - top), tl.exp(b - top)
    total = mass_a + mass_b
    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    share = 1.0 / total
    tl.store(lse + row, tl.where(is_empty, -float("inf"), top + tl.log(total)), mask=live)
    kept = row[:, None] * D + d[None, :]
    new = (head // H) * stride_b + (head % H) * stride_h + t.to(tl.int64) * stride_t
    x = tl.load(out + kept, mask=inside, other=0.0)
    y = tl.load(part + new[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    x = x * (mass_a * share)[:, None] + y * (mass_b * share)[:, None]
    tl.store(out + kept, x, mask=inside)


def merge_into(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Make `out` [B, H, T, D] and `lse` [B, H, T], contiguous float32, the state over their tokens
    and those of `part` [B, H, T, D] (any float dtype and strides) and `part_lse` [B, H, T].

    The twin of `wavekv.kernels.reference.merge_state`.
    """
    B, H, T, D = out.shape
    if lse.numel() == 0:
        return
    if not (out.is_contiguous() and lse.is_contiguous()):
        raise ValueError("the state to merge into must be contiguous")
    if part.stride(-1) != 1:
        part = part.contiguous()
    width = power_of_two(D)
    rows = max(1, _TILE // width)
    launch(
        _merge_into,
        (B * H, triton.cdiv(T, rows)),
        *(out, lse, part, part_lse.contiguous(), H, T, *part.stride()[:3]),
        D=D,
        D_P=width,
        ROWS=rows,
    )
