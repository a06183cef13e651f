"""Small integers as the floats of a matrix product.

A GPU converts sixteen numbers a clock and multiprocessor, which takes longer than reading them.
Here bytes become the low bits of a float whose unit is one, from which a constant is taken away;
both are exact, and two numbers share a word.
"""

import triton
import triton.language as tl


@triton.jit
def signed_floats(codes, DTYPE: tl.constexpr, HARDWARE: tl.constexpr):
    """int8 codes as floats. HARDWARE: whether the kernel is compiled, not interpreted."""
    if HARDWARE and tl.bfloat16 == DTYPE:
        # 128 + the low seven bits, less 128, or 256 where the sign is set
        floats = tl.inline_asm_elementwise(
            """{
            .reg .b32 low, sign, one, a, b;
            mov.b32 one, 0x3F803F80;
            and.b32 low, $2, 0x7F7F7F7F;
            and.b32 sign, $2, 0x80808080;
            prmt.b32 a, low, 0x43434343, 0x4140;
            prmt.b32 b, sign, 0xC3C3C3C3, 0x4140;
            fma.rn.bf16x2 $0, a, one, b;
            prmt.b32 a, low, 0x43434343, 0x4342;
            prmt.b32 b, sign, 0xC3C3C3C3, 0x4342;
            fma.rn.bf16x2 $1, a, one, b;
            }""",
            "=r,=r,r",
            [codes],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    elif HARDWARE and tl.float16 == DTYPE:
        # 1024 + 128 + the code, less 1152
        floats = tl.inline_asm_elementwise(
            """{
            .reg .b32 code, less, a;
            mov.b32 less, 0xE480E480;
            xor.b32 code, $2, 0x80808080;
            prmt.b32 a, code, 0x64646464, 0x4140;
            add.rn.f16x2 $0, a, less;
            prmt.b32 a, code, 0x64646464, 0x4342;
            add.rn.f16x2 $1, a, less;
            }""",
            "=r,=r,r",
            [codes],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    else:
        # by way of float32: the interpreter knows no other way from integers to bfloat16
        floats = codes.to(tl.float32).to(DTYPE)
    return floats


@triton.jit
def nibble_floats(codes, DTYPE: tl.constexpr, HARDWARE: tl.constexpr):
    """The low and the high four bits of uint8 codes, each less 8, as floats.

    Not pure for Triton: what is pure it moves behind a change of layout, where each byte comes by
    itself.
    """
    if HARDWARE and tl.bfloat16 == DTYPE:
        # 128 + four bits, less 136
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, one, less, a;
            mov.b32 one, 0x3F803F80;
            mov.b32 less, 0xC308C308;
            and.b32 low, $4, 0x0F0F0F0F;
            shr.u32 high, $4, 4;
            and.b32 high, high, 0x0F0F0F0F;
            prmt.b32 a, low, 0x43434343, 0x4140;
            fma.rn.bf16x2 $0, a, one, less;
            prmt.b32 a, low, 0x43434343, 0x4342;
            fma.rn.bf16x2 $1, a, one, less;
            prmt.b32 a, high, 0x43434343, 0x4140;
            fma.rn.bf16x2 $2, a, one, less;
            prmt.b32 a, high, 0x43434343, 0x4342;
            fma.rn.bf16x2 $3, a, one, less;
            }""",
            "=r,=r,=r,=r,r",
            [codes],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=False,
            pack=4,
        )
    elif HARDWARE and tl.float16 == DTYPE:
        # 1024 + four bits, less 1032
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, less, a;
            mov.b32 less, 0xE408E408;
            and.b32 low, $4, 0x0F0F0F0F;
            shr.u32 high, $4, 4;
            and.b32 high, high, 0x0F0F0F0F;
            prmt.b32 a, low, 0x64646464, 0x4140;
            add.rn.f16x2 $0, a, less;
            prmt.b32 a, low, 0x64646464, 0x4342;
            add.rn.f16x2 $1, a, less;
            prmt.b32 a, high, 0x64646464, 0x4140;
            add.rn.f16x2 $2, a, less;
            prmt.b32 a, high, 0x64646464, 0x4342;
            add.rn.f16x2 $3, a, less;
            }""",
            "=r,=r,=r,=r,r",
            [codes],
            dtype=(tl.float16, tl.float16),
            is_pure=False,
            pack=4,
        )
    else:
        low = ((codes & 15).to(tl.float32) - 8.0).to(DTYPE)
        high = ((codes >> 4).to(tl.float32) - 8.0).to(DTYPE)
    return low, high
