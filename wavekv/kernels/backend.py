"""Which of the two implementations of a kernel runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

from torch import Tensor

Backend = Literal["auto", "torch", "numba"]

_BACKEND: ContextVar[Backend] = ContextVar("wavekv_kernels_backend", default="auto")


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Fix the backend inside a with block, for this thread; meant for tests and measurements.

    "torch" is the reference, "numba" the CPU kernels (they refuse other devices), "auto" the
    default.
    """
    if backend not in ("auto", "torch", "numba"):
        raise ValueError(f'backend must be "auto", "torch" or "numba", got {backend!r}')
    token = _BACKEND.set(backend)
    try:
        yield
    finally:
        _BACKEND.reset(token)


def uses_numba(*tensors: Tensor) -> bool:
    """Whether the numba kernels run for these tensors, else the torch reference.

    Raises:
        ValueError: they are not on one device, or not where the fixed backend runs.
    """
    device = tensors[0].device
    for tensor in tensors:
        if tensor.device != device:
            raise ValueError(f"tensors must be on one device, got {device} and {tensor.device}")
    name = _BACKEND.get()
    if name == "torch" or (name == "auto" and device.type != "cpu"):
        return False
    if device.type != "cpu":
        raise ValueError(f"the numba backend needs CPU tensors, got one on {device}")
    return True
