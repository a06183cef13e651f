"""Inner products of an int8 query with planes of codes (numba).

A 64-byte vector of a plane holds words of up to 16 rows; shifted by b bits and masked, each of its
bytes is one code of b bits. One instruction (`vpdpbusd`, AVX512-VNNI) multiplies all of these with
64 int8 of the query and adds them in fours to 16 sums. Where the CPU lacks it, a plain loop does
the same.
"""

# mypy: disallow-untyped-decorators=False
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.numpy_support import carray

from wavekv.kernels.cpu_codes import HAS_VNNI, LANES, VECTOR, store_sums
from wavekv.kernels.cpu_math import int8_at, int32_at, uint8_at

_WORD_MASKS = {1: 0x01010101, 2: 0x03030303}


def _vnni_dots(bits: int) -> Any:
    """A kernel function in LLVM IR; see `_portable_dots`."""
    i8, i32, i64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
    words, octets = ir.VectorType(i32, LANES), ir.VectorType(i8, VECTOR)
    shifts = 8 // bits

    @intrinsic
    def dots(
        typing_context: Any, codes: Any, query: Any, count: Any, step: Any, keys: Any, out: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            codes, query, count, step, keys, out = args
            product = builder.module.declare_intrinsic(
                "llvm.x86.avx512.vpdpbusd.512", (), ir.FunctionType(words, [words] * 3)
            )

            def load(address: Any, kind: Any) -> Any:
                return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)

            def splat(value: int) -> Any:
                return ir.Constant(words, [ir.Constant(i32, value)] * LANES)

            sums = [cgutils.alloca_once_value(builder, ir.Constant(words, None)) for _ in range(2)]
            with cgutils.for_range(builder, count, intp=i64) as loop:
                packed = load(builder.add(codes, builder.mul(loop.index, step)), words)
                size = ir.Constant(i64, shifts * VECTOR)
                factors = builder.add(query, builder.mul(loop.index, size))
                for k in range(shifts):
                    shifted = builder.lshr(packed, splat(bits * k)) if k else packed
                    unsigned = builder.and_(shifted, splat(_WORD_MASKS[bits]))
                    at = builder.add(factors, ir.Constant(i64, k * VECTOR))
                    signed = builder.bitcast(load(at, octets), words)
                    total = builder.load(sums[k % 2])
                    builder.store(builder.call(product, [total, unsigned, signed]), sums[k % 2])
            store_sums(builder, sums, keys, out)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), codegen

    return dots


def _portable_dots(bits: int) -> Any:
    """out [16] int32 = the sum over `count` vectors, `step` bytes apart, of codes times query.

    Lane n of a vector belongs to row n % keys, where keys divides 16: the sums of a row's lanes are
    added, and out repeats them. The query is laid out as `lay_out_query` does it. All arguments are
    addresses or sizes.
    """
    shifts, mask = 8 // bits, 2**bits - 1

    @njit(fastmath=False, nogil=True, cache=True)
    def dots(codes: int, query: int, count: int, step: int, keys: int, out: int) -> None:
        sums = carray(int32_at(out), (LANES,))
        sums[:] = np.int32(0)
        for v in range(count):
            packed = carray(uint8_at(codes + v * step), (VECTOR,))
            factors = carray(int8_at(query + v * shifts * VECTOR), (shifts, VECTOR))
            for k in range(shifts):
                for lane in range(LANES):
                    total = np.int32(0)
                    for b in range(4 * lane, 4 * lane + 4):
                        code = (np.int32(packed[b]) >> (bits * k)) & mask
                        total += np.int32(code * np.int32(factors[k, b]))
                    sums[lane] += total
        for lane in range(keys, LANES):
            sums[lane % keys] += sums[lane]
        for lane in range(keys, LANES):
            sums[lane] = sums[lane % keys]

    return dots


_dots_1 = (_vnni_dots if HAS_VNNI else _portable_dots)(1)
_dots_2 = (_vnni_dots if HAS_VNNI else _portable_dots)(2)


@njit(fastmath=False, nogil=True, cache=True)
def num_factors(words: int, rows: int, bits: int) -> int:
    """Bytes of a query laid out for planes of so many words and rows."""
    keys = min(rows, LANES)
    if LANES % keys:
        return 0
    return (words * keys + LANES - 1) // LANES * VECTOR * (8 // bits)


@njit(fastmath=False, nogil=True, cache=True)
def lay_out_query(codes: Any, words: int, rows: int, bits: int, factors: Any) -> None:
    """Put a query's codes [W] int8 as the lanes of a plane want them: factors [num_factors] int8:
    for each vector and shift 64 bytes, zeros where a vector has no word."""
    keys, shifts = min(rows, LANES), 8 // bits
    if LANES % keys:
        return
    factors[:] = np.int8(0)
    # four bytes at a time
    fours = carray(int32_at(codes.ctypes.data), (codes.size // 4,))
    lanes = carray(int32_at(factors.ctypes.data), (factors.size // 4,))
    for word in range(words):
        vector, first = word * keys // LANES, word * keys % LANES
        for k in range(shifts):
            at, four = (vector * shifts + k) * LANES + first, fours[word * shifts + k]
            for key in range(keys):
                lanes[at + key] = four


@njit(fastmath=False, nogil=True, cache=True)
def lay_out_heads(codes: Any, words: int, rows: int, bits: int) -> Any:
    """`lay_out_query` of all queries [heads, G, W] int8: [heads, G, num_factors]."""
    heads, group, _ = codes.shape
    factors = np.empty((heads, group, num_factors(words, rows, bits)), np.int8)
    for head in range(heads):
        for g in range(group):
            lay_out_query(codes[head, g], words, rows, bits, factors[head, g])
    return factors


@njit(fastmath=False, nogil=True, cache=True)
def plane_dots(
    plane: int, factors: int, codes: Any, words: int, rows: int, bits: int, out: int
) -> None:
    """The codes of `rows` rows times a query: int32 sums at `out`, with room for max(rows, 16).

    plane: address of [words, rows, 4] bytes. factors: address of the query as laid out for it;
    codes: the query [W] int8.
    """
    if rows <= LANES and LANES % rows == 0:
        whole = words * rows // LANES
        if bits == 2:
            _dots_2(plane, factors, whole, VECTOR, rows, out)
        else:
            _dots_1(plane, factors, whole, VECTOR, rows, out)
        if words * rows % LANES:
            _add_words(plane, codes, whole * LANES // rows, words, rows, bits, out)
    elif rows % LANES == 0:
        for part in range(rows // LANES):
            at, step = part * VECTOR, rows * 4
            if bits == 2:
                _dots_2(plane + at, factors, words, step, LANES, out + at)
            else:
                _dots_1(plane + at, factors, words, step, LANES, out + at)
    else:
        carray(int32_at(out), (rows,))[:] = np.int32(0)
        _add_words(plane, codes, 0, words, rows, bits, out)


@njit(fastmath=False, nogil=True, cache=True)
def _add_words(
    plane: int, codes: Any, first: int, words: int, rows: int, bits: int, out: int
) -> None:
    """Add to the sums what the words from `first` on give: those that fill no whole vector."""
    packed = carray(uint8_at(plane), (words, rows, 4))
    sums = carray(int32_at(out), (rows,))
    shifts, mask = 8 // bits, (1 << bits) - 1
    for row in range(rows):
        total = np.int32(0)
        for word in range(first, words):
            for k in range(shifts):
                for i in range(4):
                    code = (np.int32(packed[word, row, i]) >> (bits * k)) & mask
                    total += np.int32(code * np.int32(codes[4 * (word * shifts + k) + i]))
        sums[row] += total
