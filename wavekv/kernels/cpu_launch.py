"""Launching numba kernels: threads, and torch tensors as addresses and strides."""

import threading
from collections.abc import Callable
from typing import Any

import numba
import torch
from torch import Tensor

from wavekv.kernels.cpu_math import BFLOAT16, FLOAT16, FLOAT32

DTYPE_CODES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}

# numba's workqueue threading layer crashes when two threads launch at once.
_LAUNCH = threading.Lock()

# numba's OpenMP layer shares libgomp with torch, and as it starts (here) it sets torch's thread
# count.
_torch_threads = torch.get_num_threads()
numba.get_num_threads()
torch.set_num_threads(_torch_threads)

# A launch is cut into at most so many tasks (more where there are more heads), enough to keep a
# large machine busy, and each task gets at least so many rows, enough to pay for joining it.
_MAX_TASKS = 128
_MIN_ROWS = 256


def launch(
    kernel: Callable[..., Any], rows: int, *arguments: Any, num_threads: int | None = None
) -> Any:
    """Run a kernel over so many rows in all, on no more threads than torch uses, or
    than `num_threads`.

    A small launch stays on the calling thread: waking the others takes longer, and far longer where
    another process holds their cores. numba's own setting is left as it was.
    """
    most = min(num_threads or torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    with _LAUNCH:
        before = numba.get_num_threads()
        numba.set_num_threads(max(1, min(most, rows // _MIN_ROWS)))
        try:
            return kernel(*arguments)
        finally:
            numba.set_num_threads(before)


def splits(heads: int, rows: int) -> int:
    """Into how many tasks to cut a KV head's rows: from shapes alone, never the thread count."""
    return max(1, min(rows // _MIN_ROWS, _MAX_TASKS // max(heads, 1)))


def float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()


def view(tensor: Tensor) -> tuple[int, int, int, int, int]:
    """Address, dtype code (-1: no floats) and byte strides of the three outer dimensions."""
    size = tensor.element_size()
    stride = tensor.stride()
    code = DTYPE_CODES.get(tensor.dtype, -1)
    return tensor.data_ptr(), code, stride[0] * size, stride[1] * size, stride[2] * size
