"""Inner products of an int8 query with packed codes (numba): the loop that reads the most bytes.

Codes lie in blocks of 64-byte vectors: a vector holds four dimensions of 16 keys, so that one
instruction (`vpdpbusd`, AVX512-VNNI) multiplies all 64 bytes and adds them in groups of four to 16
sums, and no sum across lanes is ever needed. Where the CPU lacks it, a plain loop does the same.
"""

# mypy: disallow-untyped-decorators=False
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.numpy_support import carray

from wavekv.kernels.cpu_math import int8_at, int32_at, uint8_at

LANES = 16
"""int32 sums in a vector."""
VECTOR = 64
"""Bytes in a vector."""
_MAX_CODE = np.float32(127.0)
_TINY = np.finfo(np.float32).tiny


def _has_vnni() -> bool:
    """Whether code compiled here may use AVX512-VNNI."""
    if numba.config.CPU_NAME or numba.config.CPU_FEATURES:
        return "+avx512vnni" in (numba.config.CPU_FEATURES or "")
    found = binding.get_host_cpu_features().get("avx512vnni", False)
    return bool(found and numba.config.ENABLE_AVX)


HAS_VNNI = _has_vnni()


def store_sums(builder: Any, sums: list[Any], keys: Any, out: Any) -> None:
    """LLVM IR that adds up two variables of `LANES` sums, where these are of fewer keys also the
    lanes of a key, and stores the total at the address `out`."""
    i32, i64 = ir.IntType(32), ir.IntType(64)
    words = ir.VectorType(i32, LANES)
    total = builder.add(builder.load(sums[0]), builder.load(sums[1]))
    for distance in (8, 4, 2, 1):
        turned = [(lane + distance) % LANES for lane in range(LANES)]
        mask = ir.Constant(words, [ir.Constant(i32, lane) for lane in turned])
        folded = builder.add(total, builder.shuffle_vector(total, total, mask))
        is_spread = builder.icmp_signed("<=", keys, ir.Constant(i64, distance))
        total = builder.select(is_spread, folded, total)
    builder.store(total, builder.inttoptr(out, words.as_pointer()), align=1)


def _vnni_dots(is_nibble: bool) -> Any:
    """A kernel function (codes, query, count, step, high, keys, out) in LLVM IR; see
    `_portable_dots`."""
    i8, i32, i64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
    words, octets = ir.VectorType(i32, LANES), ir.VectorType(i8, VECTOR)

    @intrinsic
    def dots(
        typing_context: Any,
        codes: Any,
        query: Any,
        count: Any,
        step: Any,
        high: Any,
        keys: Any,
        out: Any,
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            codes, query, count, step, high, keys, out = args
            product = builder.module.declare_intrinsic(
                "llvm.x86.avx512.vpdpbusd.512", (), ir.FunctionType(words, [words] * 3)
            )

            def load(address: Any, kind: Any) -> Any:
                return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)

            def splat(value: int) -> Any:
                return ir.Constant(octets, [ir.Constant(i8, value)] * VECTOR)

            def add_products(sum_at: Any, unsigned: Any, signed: Any) -> None:
                # LLVM 22 took the operands to be bytes; it still accepts the older words
                operands = [builder.bitcast(x, words) for x in (unsigned, signed)]
                builder.store(builder.call(product, [builder.load(sum_at), *operands]), sum_at)

            sums = [cgutils.alloca_once_value(builder, ir.Constant(words, None)) for _ in range(2)]
            with cgutils.for_range(builder, count, intp=i64) as loop:
                at = builder.mul(loop.index, step)
                packed = load(builder.add(codes, at), octets)
                low = builder.and_(packed, splat(15)) if is_nibble else packed
                add_products(sums[0], low, load(builder.add(query, at), octets))
                if is_nibble:
                    upper = builder.add(builder.add(query, high), at)
                    add_products(sums[1], builder.lshr(packed, splat(4)), load(upper, octets))
            store_sums(builder, sums, keys, out)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 7), codegen

    return dots


def _portable_dots(is_nibble: bool) -> Any:
    """out [16] int32 = the sum over `count` vectors, `step` bytes apart, of codes times query.

    Byte b of a vector belongs to lane b // 4, and lane n to key n % keys, where keys divides 16:
    the sums of a key's lanes are added, and out repeats them. Nibbles: the low ones meet the query
    at the vector's own offset, the high ones `high` bytes further on. All arguments are addresses
    or sizes.
    """

    @njit(nogil=True, cache=True)
    def dots(codes: int, query: int, count: int, step: int, high: int, keys: int, out: int) -> None:
        sums = carray(int32_at(out), (LANES,))
        sums[:] = np.int32(0)
        for v in range(count):
            packed = carray(uint8_at(codes + v * step), (VECTOR,))
            low = carray(int8_at(query + v * step), (VECTOR,))
            for lane in range(LANES):
                total = np.int32(0)
                for b in range(4 * lane, 4 * lane + 4):
                    code = packed[b] & np.uint8(15) if is_nibble else packed[b]
                    total += np.int32(code) * np.int32(low[b])
                sums[lane] += total
            if is_nibble:
                upper = carray(int8_at(query + high + v * step), (VECTOR,))
                for lane in range(LANES):
                    total = np.int32(0)
                    for b in range(4 * lane, 4 * lane + 4):
                        total += np.int32(packed[b] >> np.uint8(4)) * np.int32(upper[b])
                    sums[lane] += total
        for lane in range(keys, LANES):
            sums[lane % keys] += sums[lane]
        for lane in range(keys, LANES):
            sums[lane] = sums[lane % keys]

    return dots


nibble_dots = (_vnni_dots if HAS_VNNI else _portable_dots)(is_nibble=True)
byte_dots = (_vnni_dots if HAS_VNNI else _portable_dots)(is_nibble=False)


@njit(fastmath=False, nogil=True, cache=True)
def quantise_query(query: Any, codes: Any) -> Any:
    """Write int8 codes [W] of a query [D <= W], zeros behind; return (scale, sum of the codes)."""
    largest = np.float32(0.0)
    for x in query:
        largest = max(largest, abs(x))
    codes[:] = np.int8(0)
    # below the smallest normal number its reciprocal would be none
    if not largest >= _TINY:
        return np.float32(0.0), np.int32(0)
    total = np.int32(0)
    for d in range(query.size):
        code = np.int32(np.rint(query[d] / largest * _MAX_CODE))
        codes[d] = np.int8(code)
        total += code
    return largest / _MAX_CODE, total


@njit(fastmath=False, nogil=True, cache=True)
def lay_out_query(codes: Any, keys: int, plane: Any) -> None:
    """Repeat a query's codes [W'] as codes of `keys` keys lie: plane [W' / 4 * keys * 4] int8."""
    at = 0
    for group in range(codes.size // 4):
        for _ in range(keys):
            for i in range(4):
                plane[at] = codes[4 * group + i]
                at += 1


@njit(fastmath=False, nogil=True, cache=True)
def page_dots(codes: int, plane: int, groups: int, page_size: int, out: int) -> None:
    """The codes, 0..15, of the keys of one page times a query: int32 sums at `out`.

    codes: address of [groups, P, 4] bytes. plane: address of the query's low and then its high
    half, each laid out like that. out: room for max(P, 16) sums; those of the page come first.
    """
    size = groups * page_size * 4
    if page_size <= LANES and LANES % page_size == 0:
        whole = size // VECTOR
        nibble_dots(codes, plane, whole, VECTOR, size, page_size, out)
        if size % VECTOR:
            first = whole * LANES // page_size
            _add_groups(codes, plane, first, groups, page_size, out)
    elif page_size % LANES == 0:
        for part in range(page_size // LANES):
            at, step = part * VECTOR, page_size * 4
            nibble_dots(codes + at, plane + at, groups, step, size, LANES, out + at)
    else:
        carray(int32_at(out), (page_size,))[:] = np.int32(0)
        _add_groups(codes, plane, 0, groups, page_size, out)


@njit(fastmath=False, nogil=True, cache=True)
def _add_groups(codes: int, plane: int, first: int, groups: int, page_size: int, out: int) -> None:
    """Add to the sums what the groups from `first` on give: those that fill no whole vector."""
    packed = carray(uint8_at(codes), (groups, page_size, 4))
    factors = carray(int8_at(plane), (2, groups, page_size, 4))
    sums = carray(int32_at(out), (page_size,))
    for p in range(page_size):
        total = np.int32(0)
        for group in range(first, groups):
            for i in range(4):
                code = packed[group, p, i]
                total += np.int32(code & np.uint8(15)) * np.int32(factors[0, group, p, i])
                total += np.int32(code >> np.uint8(4)) * np.int32(factors[1, group, p, i])
        sums[p] += total
