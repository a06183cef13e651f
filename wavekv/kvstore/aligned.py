"""Host memory that begins with a page of the operating system, as reads around its cache need."""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor


def aligned_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of memory that is faulted in as it is written, given back when its last view goes.

    Raises:
        OSError: the system has no such memory.
    """
    size = max(1, prod(shape)) * dtype.itemsize
    if not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # the tensor holds the mapping
    return torch.frombuffer(memory, dtype=dtype, count=prod(shape)).view(shape)
