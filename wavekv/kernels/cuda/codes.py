"""Products of the codes of pages with the queries of a group, on tensor cores.

The columns of a product are SETS sets of pages with GP heads each: the codes of one set meet
queries that are zero in the columns of the others, so that all sets add up in one accumulator that
has no empty columns. Its rows are the keys of a page before its pages: that leaves all keys of a
page to one thread, which sums over them alone.

A row of codes is its words, four of them to a QUAD, in an order that leaves every thread the bytes
that it multiplies. Codes that lie two bits up stay there and count four times: the others are
multiplied first, and their total by four.
"""

import triton
import triton.language as tl

COLUMNS = 8
"""Of a product: tensor cores take no fewer."""


@triton.jit
def load_queries(
    query,
    ODD: tl.constexpr,
    SET: tl.constexpr,
    SETS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WARPS: tl.constexpr,
    G: tl.constexpr,
    WIDTH: tl.constexpr,
    QUADS: tl.constexpr,
):
    """Half of the components of G queries in the columns of a set, zero elsewhere
    [WARPS, 32 * QUADS, SETS * GP] int8, the same for each warp: of every eight dimensions the last
    four if ODD, or the first.

    query: the int8 queries, WIDTH bytes each.
    """
    GP: tl.constexpr = COLUMNS // SETS
    word = 4 * tl.arange(0, QUADS)[:, None, None] + tl.arange(0, 4)[:, None, None, None, None, None]
    column = tl.arange(0, COLUMNS)[:, None, None, None, None]
    # each warp loads its own: none waits for another
    warp = tl.zeros([WARPS], tl.int32)[:, None, None, None]
    half, byte = tl.arange(0, 2)[:, None], tl.arange(0, 4)
    head, d = column % GP, 16 * word + 8 * half + 4 * ODD + byte
    is_own = (column // GP == SET) & (head < G) & (d < WIDTH)
    x = tl.load(query + (head * WIDTH + d + warp), mask=is_own, other=0)
    return tl.reshape(tl.permute(x, (2, 3, 0, 4, 5, 1)), [WARPS, 32 * QUADS, COLUMNS])


@triton.jit
def _packed(x, y, CODE: tl.constexpr):
    """Instructions on the bytes of x and y, four at a time."""
    return tl.inline_asm_elementwise(CODE, "=r,r,r", [x, y], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def load_plane(
    plane,
    n,
    wanted,
    P: tl.constexpr,
    PP: tl.constexpr,
    WORDS: tl.constexpr,
    QUADS: tl.constexpr,
    IS_LOW: tl.constexpr,
    ASM: tl.constexpr,
):
    """Words of the high plane of pages n [PAGES] as bytes [4, PAGES, QUADS * parts, bytes]; or of
    the low plane what goes with them, in the low four bits of each byte."""
    BYTES: tl.constexpr = 4 * PP if PP < 4 else 16
    PARTS: tl.constexpr = 4 * PP // BYTES
    part, byte = tl.arange(0, QUADS * PARTS)[None, None, :, None], tl.arange(0, BYTES)
    word = 4 * (part // PARTS) + tl.arange(0, 4)[:, None, None, None]
    byte = BYTES * (part % PARTS) + byte[None, None, None, :]
    # a word of one bit a dimension goes with two of two bits
    at_word = word // 2 if IS_LOW else word
    at = n.to(tl.int64)[None, :, None, None] * (WORDS * P * 4) + at_word * (P * 4) + byte
    mask = wanted[None, :, None, None] & (at_word < WORDS) & (byte < 4 * P)
    x = tl.load(plane + at, mask=mask, other=0)
    if IS_LOW:
        is_second = tl.broadcast_to(word % 2, x.shape) == 1
        if ASM:
            second = tl.where(is_second, -1, 0).to(tl.int8)
            x = _packed(
                x, second, "{ .reg .b32 t; shr.u32 t, $1, 4; lop3.b32 $0, $2, t, $1, 0xca; }"
            )
        else:
            x = tl.where(is_second, x >> 4, x)
    return x


@triton.jit
def high_codes(x, ODD: tl.constexpr, ASM: tl.constexpr):
    """Codes of the high plane for `load_queries`, four times of those if ODD: of dimensions whose
    bits lie in the low half of a byte, and in the high one."""
    MASK: tl.constexpr = 12 if ODD else 3
    if ASM:
        if ODD:
            low = _packed(x, x, "and.b32 $0, $1, 0x0c0c0c0c;")
            high = _packed(x, x, "{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0c0c0c0c; }")
        else:
            low = _packed(x, x, "and.b32 $0, $1, 0x03030303;")
            high = _packed(x, x, "{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x03030303; }")
    else:
        low, high = x & MASK, (x >> 4) & MASK
    return low, high


@triton.jit
def all_codes(x, y, ODD: tl.constexpr, ASM: tl.constexpr):
    """`high_codes`, but of both planes."""
    if ASM:
        if ODD:
            low = _packed(
                *(x, y),
                "{ .reg .b32 s, t; shl.b32 s, $1, 1; shl.b32 t, $2, 1; and.b32 s, s, 0x18181818; "
                "and.b32 t, t, 0x04040404; or.b32 $0, s, t; }",
            )
            high = _packed(
                *(x, y),
                "{ .reg .b32 s, t; shr.u32 s, $1, 3; shr.u32 t, $2, 1; and.b32 s, s, 0x18181818; "
                "and.b32 t, t, 0x04040404; or.b32 $0, s, t; }",
            )
        else:
            low = _packed(
                *(x, y),
                "{ .reg .b32 s, t; shl.b32 s, $1, 1; and.b32 s, s, 0x06060606; "
                "and.b32 t, $2, 0x01010101; or.b32 $0, s, t; }",
            )
            high = _packed(
                *(x, y),
                "{ .reg .b32 s, t; shr.u32 s, $1, 3; shr.u32 t, $2, 2; and.b32 s, s, 0x06060606; "
                "and.b32 t, t, 0x01010101; or.b32 $0, s, t; }",
            )
    elif ODD:
        low, high = ((x << 1) & 24) | ((y << 1) & 4), ((x >> 3) & 24) | ((y >> 1) & 4)
    else:
        low, high = ((x << 1) & 6) | (y & 1), ((x >> 3) & 6) | ((y >> 2) & 1)
    return low, high


@triton.jit
def add_products(low, high, queries, total):
    """total [rows, columns] + the products of codes [4, PAGES, QUADS * parts, bytes] with
    `load_queries`."""
    PAGES: tl.constexpr = low.shape[1]
    ROWS: tl.constexpr = total.shape[0]
    QUADS: tl.constexpr = queries.shape[1] // 32
    COLUMNS: tl.constexpr = queries.shape[2]
    # quads, then words, then halves, then their bytes
    x = tl.reshape(tl.join(low, high), [4, PAGES, QUADS, ROWS // PAGES, 4, 2])
    x = tl.reshape(tl.permute(x, (3, 1, 2, 0, 5, 4)), [ROWS, 32 * QUADS])
    return tl.dot(x, tl.reshape(queries, [32 * QUADS, COLUMNS]), total, out_dtype=tl.int32)


@triton.jit
def mean_products(
    plane,
    n,
    wanted,
    even,
    odd,
    SETS: tl.constexpr,
    K: tl.constexpr,
    WORDS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Four times the products [PAGES, SETS, GP] of the queries with the mean keys of pages
    n [SETS * PAGES], those of one set after those of another."""
    QUADS: tl.constexpr = even[0].shape[1] // 32
    COLUMNS: tl.constexpr = even[0].shape[2]
    word = 4 * tl.arange(0, QUADS)[None, None, :, None] + tl.arange(0, 4)[:, None, None, None]
    n4 = n.to(tl.int64)[None, :, None, None]
    at = (n4 // K * (WORDS * K) + word * K + n4 % K) * 4 + tl.arange(0, 4)[None, None, None, :]
    x = tl.load(plane + at, mask=wanted[None, :, None, None] & (word < WORDS), other=0)
    total = tl.zeros([n.shape[0], COLUMNS], tl.int32)
    low, high = high_codes(x, 0, ASM)
    for s in tl.static_range(SETS):
        total = add_products(low, high, even[s], total)
    total *= 4
    low, high = high_codes(x, 1, ASM)
    for s in tl.static_range(SETS):
        total = add_products(low, high, odd[s], total)
    # every page in its own set's columns alone
    total = tl.reshape(total, [SETS, n.shape[0] // SETS, SETS, COLUMNS // SETS])
    s = tl.arange(0, SETS)
    is_own = s[:, None, None, None] == s[None, None, :, None]
    return tl.sum(tl.where(is_own, total, 0), 0)
