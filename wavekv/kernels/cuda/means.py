"""Products of the mean keys of all pages with the queries of a group: see `codes`.

Each thread reads one word of PART pages in a row, which lie side by side, and has the products of
these pages: so it also writes what belongs to them at once.
"""

import triton
import triton.language as tl

from wavekv.kernels.cuda.codes import high_codes

LANES: tl.constexpr = tl.constexpr(8)
"""Threads of a warp that read the same word, of different pages."""


@triton.jit
def part_of(s, WARPS: tl.constexpr, SETS: tl.constexpr, TIMES: tl.constexpr):
    """Which PART pages those of set s are [..., LANES, WARPS, TIMES, 1]."""
    lane = tl.arange(0, LANES)[:, None, None, None]
    warp, time = tl.arange(0, WARPS)[:, None, None], tl.arange(0, TIMES)[:, None]
    return ((warp * SETS + s) * TIMES + time) * LANES + lane


@triton.jit
def _add_products(low, high, queries, total):
    """total [WARPS, TIMES * PART * LANES, columns] + the products of codes
    [4, LANES, WARPS, TIMES, QUADS, 4 * PART] with `load_queries`."""
    WARPS: tl.constexpr = low.shape[2]
    TIMES: tl.constexpr = low.shape[3]
    QUADS: tl.constexpr = low.shape[4]
    PART: tl.constexpr = low.shape[5] // 4
    x = tl.reshape(tl.join(low, high), [4, LANES, WARPS, TIMES, QUADS, PART, 4, 2])
    # quads, then words, then halves, then their bytes
    x = tl.permute(x, (2, 3, 5, 1, 4, 0, 7, 6))
    x = tl.reshape(x, [WARPS, TIMES * PART * LANES, 32 * QUADS])
    return tl.dot(x, queries, total, out_dtype=tl.int32)


@triton.jit
def all_mean_products(
    plane,
    last,
    even,
    odd,
    SETS: tl.constexpr,
    TIMES: tl.constexpr,
    PART: tl.constexpr,
    K: tl.constexpr,
    WORDS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Four times the products [columns / 2, LANES, WARPS, TIMES, 2, PART] of the queries with the
    mean keys of pages, as floats 2^23 + 2^22 above them; of the blocks after the last, anything.

    plane: of the first block. even, odd: the queries of each set.
    """
    WARPS: tl.constexpr = even[0].shape[0]
    QUADS: tl.constexpr = even[0].shape[1] // 32
    COLUMNS: tl.constexpr = even[0].shape[2]
    PARTS: tl.constexpr = K // PART
    word = 4 * tl.arange(0, QUADS)[:, None] + tl.arange(0, 4)[:, None, None, None, None, None]
    if WORDS < 4 * QUADS:
        # there the query is zero
        word = tl.where(word < WORDS, word, 0)
    # integers from here on are floats of the same bits: their last bit counts one
    total = tl.full([WARPS, TIMES * PART * LANES, COLUMNS], 0x4B400000, tl.int32)
    first = tl.zeros([WARPS, TIMES * PART * LANES, COLUMNS], tl.int32)
    for s in tl.static_range(SETS):
        part = part_of(s, WARPS, SETS, TIMES)[:, :, :, :, None]
        at = tl.minimum(part // PARTS, last) * (WORDS * K * 4) + part % PARTS * (PART * 4)
        x = tl.load(plane + (at + word * (K * 4) + tl.arange(0, 4 * PART)))
        low, high = high_codes(x, 0, ASM)
        first = _add_products(low, high, even[s], first)
        low, high = high_codes(x, 1, ASM)
        total = _add_products(low, high, odd[s], total)
    total = tl.reshape(first * 4 + total, [WARPS, TIMES, PART, LANES, COLUMNS // 2, 2])
    return tl.permute(total, (4, 3, 0, 1, 5, 2)).to(tl.float32, bitcast=True)
