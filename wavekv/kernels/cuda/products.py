"""Integer products of planes (`wavekv.kernels.planes`) with mixed queries, four at a time."""

import triton
import triton.language as tl

HEADS = 4
"""Query heads that share one pass over a plane; larger groups take several."""


@triton.jit
def _four_products(codes, query_words, total, DP4A: tl.constexpr):
    """total + the sum of four products: unsigned bytes of codes with signed bytes of a query."""
    if DP4A:
        total = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [codes, query_words + codes * 0, total],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        for i in tl.static_range(4):
            # the sign comes back by shifting up and down
            total += ((codes >> (8 * i)) & 255) * ((query_words << (24 - 8 * i)) >> 24)
    return total


@triton.jit
def _eight_products(codes, after, pair, total, DP4A: tl.constexpr):
    """`_four_products` of codes and of those after them with two words of a query."""
    total = _four_products(codes, pair.to(tl.int32), total, DP4A)
    return _four_products(after, (pair >> 32).to(tl.int32), total, DP4A)


@triton.jit
def _add_word(
    word, a, b, c, d, query, NUM: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, DP4A
):
    """Add what one word of a plane gives with the first NUM heads' pairs of query words from
    `query` on, of which each head has W / 2."""
    MASK: tl.constexpr = 0x03030303 if BITS == 2 else 0x01010101
    for k in tl.static_range(4 // BITS):
        codes = (word >> (2 * BITS * k)) & MASK
        after = (word >> (2 * BITS * k + BITS)) & MASK
        a = _eight_products(codes, after, tl.load(query + k), a, DP4A)
        if NUM > 1:
            b = _eight_products(codes, after, tl.load(query + W // 2 + k), b, DP4A)
        if NUM > 2:
            c = _eight_products(codes, after, tl.load(query + W + k), c, DP4A)
        if NUM > 3:
            d = _eight_products(codes, after, tl.load(query + 3 * W // 2 + k), d, DP4A)
    return a, b, c, d


@triton.jit
def plane_products(
    words,
    apart,
    mask,
    query,
    a,
    b,
    c,
    d,
    NUM: tl.constexpr,
    WORDS: tl.constexpr,
    W: tl.constexpr,
    BITS: tl.constexpr,
    DP4A: tl.constexpr,
):
    """Totals of NUM heads, plus the sums of the products of rows of a plane of BITS bits with the
    heads' mixed queries.

    words: the address of the first word of each row; its WORDS words lie `apart` from each other.
    query: the first head's W query words as pairs in int64 (one load for two), those of the other
    heads behind them.
    """
    for w in tl.static_range(WORDS):
        word = tl.load(words + w * apart, mask=mask, other=0)
        a, b, c, d = _add_word(word, a, b, c, d, query + w * (4 // BITS), NUM, W, BITS, DP4A)
    return a, b, c, d


@triton.jit
def of_head(a, b, c, d, K: tl.constexpr):
    """The total of the K-th of four heads."""
    out = a
    if K == 1:
        out = b
    if K == 2:
        out = c
    if K == 3:
        out = d
    return out
