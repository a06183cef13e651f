"""How kernels are launched."""

from typing import Any

import torch
from torch import Tensor


def power_of_two(n: int) -> int:
    """The least power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a Triton kernel on the device of its first tensor."""
    first = next(arg for arg in args if isinstance(arg, Tensor))
    if first.device.type != "cuda":
        # the interpreter, for tests
        kernel[grid](*args, **options)
        return
    with torch.cuda.device(first.device):
        kernel[grid](*args, **options)


def uses_hardware(tensor: Tensor) -> bool:
    """Whether kernels on this tensor are compiled: the interpreter knows no inline assembly."""
    return tensor.is_cuda
