"""Pinned host memory that is made without stopping the device.

torch pins by `cudaHostAlloc`, which faults memory in while it holds a lock of the driver: for 0.4
to 0.7 s a GiB no thread can launch a kernel. Here memory is mapped and faulted in by threads that
no launch waits for, and then registered, which takes the lock for 0.04 s a GiB.
"""

from __future__ import annotations

import ctypes
import mmap
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

_THREADS = 4
_SUCCESS = 0


def pinned_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of pinned memory, given back when the last view of it goes.

    Raises:
        RuntimeError, OSError: the system has no such memory.
    """
    size = max(1, prod(shape)) * dtype.itemsize
    if not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    memory = _Registered(size)
    # the tensor holds the mapping
    return torch.frombuffer(memory, dtype=dtype, count=prod(shape)).view(shape)


class _Registered(mmap.mmap):
    """A mapping that a CUDA device may address."""

    _address: int | None = None

    def __new__(cls, size: int) -> _Registered:
        memory = super().__new__(cls, -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory._register(size)
        return memory

    def _register(self, size: int) -> None:
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
            # a kernel may know neither
            with suppress(OSError, AttributeError):
                self.madvise(getattr(mmap, advice))
        address = ctypes.addressof(ctypes.c_char.from_buffer(self))
        _fault_in(address, size)
        # 1: for all devices
        status = torch.cuda.cudart().cudaHostRegister(address, size, 1)
        if int(status) != _SUCCESS:
            raise RuntimeError(f"{size} bytes of host memory cannot be pinned: {status}")
        self._address = address

    def __del__(self) -> None:
        address, self._address = self._address, None
        if address is None:
            return
        # also while the program ends, when nothing is left to be kept from
        with suppress(Exception):
            # what was launched may still read it
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaHostUnregister(address)


def _fault_in(address: int, size: int) -> None:
    """Write all of it once. ctypes lets other threads run meanwhile."""
    part = -(-size // (_THREADS * mmap.PAGESIZE)) * mmap.PAGESIZE
    starts = range(0, size, part)

    def write(start: int) -> None:
        ctypes.memset(address + start, 0, min(part, size - start))

    with ThreadPoolExecutor(len(starts)) as threads:
        list(threads.map(write, starts))
