"""The types of numbers that files of a context hold, by name."""

from __future__ import annotations

import torch
from torch import Tensor

from wavekv.errors import ContextFormatError, LayoutError

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def name_of(tensor_dtype: torch.dtype, what: str) -> str:
    """The name of a type; `what` has it, for errors.

    Raises:
        LayoutError: files of a context do not hold it.
    """
    if tensor_dtype not in _NAMES:
        raise LayoutError(
            f"expected {what} to be of {', '.join(DTYPES)}, got {tensor_dtype}; convert it first"
        )
    return _NAMES[tensor_dtype]


def host_copy(tensor: Tensor) -> Tensor:
    """The tensor contiguous in CPU memory; itself if it is there."""
    return tensor.detach().to("cpu").contiguous()


def bytes_of(tensor: Tensor) -> Tensor:
    """The memory of a contiguous CPU tensor as [nbytes] uint8."""
    # contiguous tensors of one number or none may have any stride, which a view would not take
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def memory_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return bytes_of(tensor).numpy().data


def expect_bools(tensor: Tensor, place: str) -> Tensor:
    """A tensor that was read; its bytes are 0 and 1 if it is of booleans.

    Raises:
        ContextFormatError: they are not.
    """
    if tensor.dtype == torch.bool and tensor.numel() and int(bytes_of(tensor).max()) > 1:
        raise ContextFormatError(
            f"expected booleans of bytes 0 and 1 in {place}, got others; take another copy"
        )
    return tensor
