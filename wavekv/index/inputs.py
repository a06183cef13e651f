"""Checking and converting what users pass in: numpy arrays, torch tensors, nested lists."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavekv.errors import DtypeError, InputError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 1e15
"""Squares and sums of larger numbers leave float32."""
LARGEST_ATTENDED = 1e7
"""Fourth powers and their sums, which attention estimates with, leave it sooner."""

Array = Any
"""A numpy array or a torch tensor."""


def as_tensor(name: str, array: object) -> Tensor:
    """A tensor of the array, sharing its memory where that can be.

    Raises:
        DtypeError: neither float32, bfloat16 nor float16.
    """
    if isinstance(array, (list, tuple)):
        array = np.asarray(array, dtype=np.float32)
    if isinstance(array, np.ndarray):
        if array.dtype not in (np.float32, np.float16):
            raise _wrong_dtype(name, array.dtype)
        if any(stride < 0 for stride in array.strides):
            array = array.copy()
        # torch wants memory that it may write to, in an order of its own
        array = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    if not isinstance(array, Tensor):
        raise DtypeError(
            f"{name} must be a numpy array or torch tensor, got {type(array).__name__}"
        )
    if array.dtype not in DTYPES:
        raise _wrong_dtype(name, array.dtype)
    return array.detach()


def as_heads(name: str, array: object, *, is_flat: bool | None = None) -> tuple[Tensor, bool]:
    """A tensor [H, N, D] of keys or queries [H, N, D] or [N, D], and whether it was [N, D].

    is_flat: what it has to be, if known.

    Raises:
        InputError: another number of dimensions, no head, or no dimension.
        DtypeError: as `as_tensor`.
    """
    tensor = as_tensor(name, array)
    wanted = {None: "[H, N, D] or [N, D]", True: "[N, D]", False: "[H, N, D]"}[is_flat]
    flat = tensor.dim() == 2
    if tensor.dim() not in (2, 3) or (is_flat is not None and flat != is_flat):
        raise InputError(
            f"{name} must be {wanted}, got {tuple(tensor.shape)}"
            + ("; a single one is array[None]" if tensor.dim() == 1 else "")
        )
    if flat:
        tensor = tensor.unsqueeze(0)
    if tensor.shape[0] == 0 or tensor.shape[2] == 0:
        raise InputError(f"{name} must have heads and dimensions, got {tuple(tensor.shape)}")
    return tensor, flat


def expect_like(name: str, tensor: Tensor, *, heads: int, dim: int, device: torch.device) -> None:
    """The tensor [H, N, D] fits an index.

    Raises:
        InputError: other heads, dimensions or device.
    """
    if tensor.shape[0] != heads or tensor.shape[2] != dim:
        raise InputError(
            f"{name} must be of {heads} heads and {dim} dimensions as the index, "
            f"got {tensor.shape[0]} and {tensor.shape[2]}"
        )
    if tensor.device != device:
        raise InputError(f"{name} must be on {device} as the index, got {tensor.device}")


def expect_finite(name: str, tensor: Tensor, *, largest: float = LARGEST) -> None:
    """No NaN, no infinity, nothing beyond `largest`.

    Raises:
        InputError: naming the first place where it is.
    """
    if tensor.numel() == 0:
        return
    # one pass; NaN comes through, and fails the comparisons
    least, most = torch.aminmax(tensor)
    if float(least) >= -largest and float(most) <= largest:
        return
    bad = ~(tensor.abs() <= largest)
    at = tuple(bad.nonzero()[0].tolist())
    raise InputError(
        f"{name} must be finite, at most {largest:g}, got {float(tensor[at])} at {list(at)}"
    )


def expect_count(name: str, value: object, *, least: int = 1) -> int:
    """An integer of at least `least`.

    Raises:
        InputError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise InputError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)


def expect_share(name: str, value: object) -> float:
    """A number in (0, 1].

    Raises:
        InputError: it is not.
    """
    if isinstance(value, (int, float, np.number)) and value is not True and 0 < value <= 1:
        return float(value)
    raise InputError(f"{name} must be in (0, 1], got {value!r}")


def expect_positive(name: str, value: object, *, least: float = 0.0) -> float:
    """A finite number above 0, and of at least `least`.

    Raises:
        InputError: it is not.
    """
    if isinstance(value, (int, float, np.number)) and value is not True:
        number = float(value)
        if 0 < number < math.inf and number >= least:
            return number
    wanted = f"a number of at least {least:g}" if least else "positive"
    raise InputError(f"{name} must be {wanted}, got {value!r}")


def pages_in_budget(budget: object, num_pages: int, page_size: int) -> int:
    """Pages that a budget buys: a share of all, or a number of keys.

    Raises:
        InputError: it is neither a float in (0, 1] nor an integer of at least 1.
    """
    if isinstance(budget, (float, np.floating)) and 0 < budget <= 1:
        return math.ceil(float(budget) * num_pages)
    if isinstance(budget, (int, np.integer)) and not isinstance(budget, bool) and budget >= 1:
        return min(num_pages, -(-int(budget) // page_size))
    raise InputError(
        "budget must be a share of the keys, a float in (0, 1], or a number of keys, an integer "
        f"of at least 1, got {budget!r}"
    )


def _wrong_dtype(name: str, dtype: object) -> DtypeError:
    return DtypeError(
        f"{name} must be float32, bfloat16 or float16, got {dtype}; convert it first "
        "(.astype(numpy.float32) or .float())"
    )
