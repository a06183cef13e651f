"""Bytes as floats: every byte, in every type of queries; compiled where there is a GPU."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from wavekv.kernels.cuda.integers import nibble_floats, signed_floats
from wavekv.kernels.cuda.launch import launch, uses_hardware


@triton.jit
def _signed(codes, out, DTYPE: tl.constexpr, HARDWARE: tl.constexpr):
    i = tl.arange(0, 256)
    tl.store(out + i, signed_floats(tl.load(codes + i), DTYPE, HARDWARE))


@triton.jit
def _nibbles(codes, low, high, DTYPE: tl.constexpr, HARDWARE: tl.constexpr):
    i = tl.arange(0, 256)
    first, second = nibble_floats(tl.load(codes + i), DTYPE, HARDWARE)
    tl.store(low + i, first)
    tl.store(high + i, second)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [(torch.float32, tl.float32), (torch.bfloat16, tl.bfloat16), (torch.float16, tl.float16)]


@pytest.mark.parametrize(("dtype", "name"), TYPES, ids=[str(dtype) for dtype, _ in TYPES])
def test_signed_bytes(dtype: torch.dtype, name: tl.dtype) -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8, device=DEVICE)
    out = torch.full((256,), torch.nan, dtype=dtype, device=DEVICE)
    launch(_signed, (1,), codes, out, DTYPE=name, HARDWARE=uses_hardware(out))
    assert torch.equal(out, codes.to(dtype))


@pytest.mark.parametrize(("dtype", "name"), TYPES, ids=[str(dtype) for dtype, _ in TYPES])
def test_nibbles(dtype: torch.dtype, name: tl.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    low, high = torch.full((2, 256), torch.nan, dtype=dtype, device=DEVICE)
    launch(_nibbles, (1,), codes, low, high, DTYPE=name, HARDWARE=uses_hardware(low))

    def floats(bits: Tensor) -> Tensor:
        return (bits.int() - 8).to(dtype)

    assert torch.equal(low, floats(codes & 15))
    assert torch.equal(high, floats(codes >> 4))
