"""Building blocks of the numba kernels: rows of floats at an address, exp2 and tanh that vectorise.

The kernels get integers (addresses, strides in bytes, dtype codes) instead of arrays. So one
compiled version serves every dtype, every stride and any number of chunks, and no call unboxes an
array. A strided tensor [B, Hkv, N, D] travels as a *view*, the tuple (address, dtype, and the
strides in bytes of its three outer dimensions).

A function without fast maths says `fastmath=False`: numba compiles what it has no word on with the
flags of whoever calls it first, and keeps that.

numba's on-disk cache watches the file of a compiled function, not the files of what it calls: after
an edit here, in `cpu_state`, `cpu_codes` or `cpu_top` delete `__pycache__/*.nbi` beside it.
"""

# mypy: disallow-untyped-decorators=False
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numba.np.numpy_support import carray

# reassoc lets LLVM vectorise sums. nnan and ninf stay out: empty pages score -inf and must keep it.
FASTMATH = {"reassoc", "contract", "arcp", "nsz"}

# Of all that numba can run on threads, only our own prange loops: every further parallel region is
# one more wait for all threads. Pass a copy: numba empties the dict it gets.
PRANGE = {
    "prange": True,
    "comprehension": False,
    "fusion": False,
    "inplace_binop": False,
    "numpy": False,
    "reduction": False,
    "setitem": False,
    "stencil": False,
}

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2

LOG2_E = np.float32(1.4426950408889634)
LN_2 = np.float32(0.6931471805599453)
NEG_INF = np.float32(-np.inf)


def _cast(source: Any, target: Any, emit: Callable[[Any, Any], Any]) -> Any:
    """A kernel function from source to target type that is one piece of LLVM IR."""

    @intrinsic
    def cast(typing_context: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit(builder, args[0])

        return target(source), codegen

    return cast


def _pointer(element: Any, llvm_element: Any) -> Any:
    """A kernel function from an address to the pointer that `carray` takes."""
    pointer = llvm_element.as_pointer()
    return _cast(types.intp, types.CPointer(element), lambda b, x: b.inttoptr(x, pointer))


int8_at = _pointer(types.int8, ir.IntType(8))
uint8_at = _pointer(types.uint8, ir.IntType(8))
uint16_at = _pointer(types.uint16, ir.IntType(16))
int32_at = _pointer(types.int32, ir.IntType(32))
int64_at = _pointer(types.int64, ir.IntType(64))
float32_at = _pointer(types.float32, ir.FloatType())

# The bits of a float32 >= 0, as an integer, are in the order of the values.
float_to_bits = _cast(types.float32, types.int32, lambda b, x: b.bitcast(x, ir.IntType(32)))
bits_to_float = _cast(types.uint32, types.float32, lambda b, x: b.bitcast(x, ir.FloatType()))
half_to_float = _cast(
    types.uint16, types.float32, lambda b, x: b.fpext(b.bitcast(x, ir.HalfType()), ir.FloatType())
)


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _convert_row(address: int, dtype: int, width: int, scratch: int) -> None:
    """Write the `width` bf16 or fp16 numbers at `address` to scratch, as float32."""
    row = carray(float32_at(scratch), (width,))
    bits = carray(uint16_at(address), (width,))
    if dtype == BFLOAT16:
        for d in range(width):
            row[d] = bits_to_float(np.uint32(bits[d]) << np.uint32(16))
    else:
        for d in range(width):
            row[d] = half_to_float(bits[d])


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def row_at(address: int, dtype: int, width: int, scratch: int) -> Any:
    """The `width` numbers at `address` as float32 [width]: that memory, or converted to scratch.

    Scratch comes as an address too: an array made from an address owns nothing, so that no row
    costs an atomic reference count. The caller keeps the memory alive.
    """
    if dtype != FLOAT32:
        _convert_row(address, dtype, width, scratch)
        address = scratch
    return carray(float32_at(address), (width,))


@njit(fastmath=False, nogil=True, cache=True)
def offset(view: Any, b: int, h: int, n: int) -> Any:
    """The address of row [b, h, n] of a view."""
    return view[0] + b * view[2] + h * view[3] + n * view[4]


# Not reassociated: the same x must give the same bits in the vector body and in the tail of a loop.
@njit(fastmath={"contract", "nsz"}, nogil=True, cache=True)
def exp2(x: Any) -> Any:
    """2**x of a float32 <= 0, relative error < 3e-7; exactly 0 below -126 and at -inf."""
    whole = np.floor(x + np.float32(0.5))
    f = x - whole  # in [-0.5, 0.5), exact
    p = np.float32(1.5403530e-4)
    p = p * f + np.float32(1.3333558e-3)
    p = p * f + np.float32(9.6181291e-3)
    p = p * f + np.float32(5.5504109e-2)
    p = p * f + np.float32(2.4022651e-1)
    p = p * f + np.float32(6.9314718e-1)
    p = p * f + np.float32(1.0)
    y = p * bits_to_float(np.uint32(np.int32(whole) + np.int32(127)) << np.uint32(23))
    return np.float32(0.0) if x < np.float32(-126.0) else y


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def tanh(x: Any) -> Any:
    """tanh of a float32, absolute error < 3e-7; unlike libm's it vectorises."""
    e = exp2(np.float32(-2.0) * LOG2_E * abs(x))
    y = (np.float32(1.0) - e) / (np.float32(1.0) + e)
    return -y if x < np.float32(0.0) else y
