"""Cheap checks of shapes and dtypes; every error is a ValueError that says expected and got."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wavekv.kernels.page_codec import PageCodec

STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def expect(
    name: str, tensor: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype, like: Tensor
) -> None:
    """The tensor has this shape and one of these dtypes, and is where `like` is."""
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        got = f"{tuple(tensor.shape)} {tensor.dtype}"
        raise ValueError(f"{name} must be {shape} {wanted}, got {got}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got one on {tensor.device}")


def expect_stored(name: str, tensor: Tensor) -> None:
    """The tensor is [B, Hkv, N, D] of a stored dtype with contiguous rows."""
    if tensor.dim() != 4 or tensor.shape[1] == 0 or tensor.dtype not in STORED_DTYPES:
        raise ValueError(
            f"{name} must be [B, Hkv > 0, N, D] float32, bfloat16 or float16, "
            f"got {tuple(tensor.shape)} {tensor.dtype}"
        )
    expect_rows(name, tensor)


def expect_rows(name: str, tensor: Tensor) -> None:
    """The last dimension is contiguous."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} must have a contiguous last dimension, got {tensor.stride()}")


def expect_inner(name: str, tensor: Tensor, dims: int) -> None:
    """The last `dims` dimensions are contiguous."""
    if tensor.numel() and not tensor[(0,) * (tensor.dim() - dims)].is_contiguous():
        raise ValueError(
            f"{name} must have {dims} contiguous last dimensions, got strides {tensor.stride()}"
        )


def expect_part(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, like: Tensor
) -> None:
    """The tensor [H, ...] is as `expect` wants, and contiguous but for its heads."""
    expect(name, tensor, shape, dtype, like=like)
    expect_inner(name, tensor, len(shape) - 1)


def expect_part_of_rows(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, like: Tensor
) -> None:
    """The tensor [B, H, ...] is as `expect` wants, and contiguous but for its rows."""
    if tensor.shape == shape and tensor.dtype == dtype and tensor.device == like.device:
        size = 1
        for length, stride in zip(shape[:1:-1], tensor.stride()[:1:-1], strict=True):
            if stride != size and length > 1:
                break
            size *= length
        else:
            return
    expect(name, tensor, shape, dtype, like=like)
    expect_inner(name, tensor, len(shape) - 2)


def expect_heads(name: str, tensor: Tensor, batch: int, kv_heads: int, last: int) -> None:
    """The tensor is [B, Hq, last] of a float dtype, and Hq is a multiple of Hkv."""
    shape = tensor.shape
    fits = len(shape) == 3 and shape[0] == batch and shape[2] == last and kv_heads > 0
    if not fits or shape[1] % kv_heads or not tensor.dtype.is_floating_point:
        raise ValueError(
            f"{name} must be floats [{batch}, a multiple of Hkv={kv_heads}, {last}], "
            f"got {tuple(shape)} {tensor.dtype}"
        )


def expect_shift(shift: Tensor, log_mass: Tensor) -> None:
    """The shift of each page is there where its log mass is: kernels read both by one index."""
    if shift.shape != log_mass.shape or not shift.dtype.is_floating_point:
        raise ValueError(
            f"shift must be floats {tuple(log_mass.shape)} as log_mass, got "
            f"{tuple(shift.shape)} {shift.dtype}"
        )


def expect_softcap(softcap: float | None) -> None:
    """The soft cap is positive or None."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")


def expect_chunks(chunks: Sequence[Tensor], query: Tensor, codec: PageCodec | None) -> None:
    """The chunks are contiguous, [C, 2, P, D] of one shape and one stored dtype, or
    [C, page_bytes] uint8 if pages are in the form of a codec."""
    if not chunks:
        raise ValueError("page_ids name pages, so there must be at least one chunk, got none")
    first, width = chunks[0], query.shape[-1]
    shape, dtype, device = first.shape, first.dtype, query.device
    if codec is not None:
        if shape[1:] != (codec.page_bytes,) or dtype != torch.uint8 or codec.head_dim != width:
            raise ValueError(
                f"chunks must be [C, {codec.page_bytes}] uint8 with pages of {width} dimensions, "
                f"got {tuple(shape)} {dtype} and {codec}"
            )
    elif len(shape) != 4 or shape[1] != 2 or shape[3] != width or dtype not in STORED_DTYPES:
        raise ValueError(
            f"chunks must be [C, 2, P, {width}] float32, bfloat16 or float16, "
            f"got {tuple(shape)} {dtype}"
        )
    for chunk in chunks:
        if chunk.shape != shape or chunk.dtype != dtype or chunk.device != device:
            raise ValueError(
                f"chunks must all be {tuple(shape)} {dtype} on {device}, "
                f"got {tuple(chunk.shape)} {chunk.dtype} on {chunk.device}"
            )
        if not chunk.is_contiguous():
            raise ValueError(f"chunks must be contiguous, got strides {chunk.stride()}")
