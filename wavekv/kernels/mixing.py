"""Mixing: an orthonormal matrix after which no dimension stands out, so that one scale serves all.

(QuaRot, 2024, mixes by Hadamard matrices for that.)
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def mixing(size: int) -> Tensor:
    """An orthogonal matrix [n, n] float64 that spreads decreasing variances evenly: rows are dealt
    to groups back and forth, as cards are, and each group is mixed by a Hadamard matrix, its size
    the largest power of two in n."""
    block = size & -size
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < block:
        hadamard = torch.cat(
            [torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]
        )
    num_blocks = size // block
    dealt = torch.arange(size).view(block, num_blocks)
    dealt[1::2] = dealt[1::2].flip(1)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for b in range(num_blocks):
        matrix[dealt[:, b], b * block : (b + 1) * block] = hadamard / block**0.5
    return matrix


@lru_cache
def mixing_on(device: torch.device, size: int) -> Tensor:
    """`mixing(size)` as float32 on a device: made once, not to be changed."""
    with torch.inference_mode(False):
        matrix = mixing(size).float()
    return constant_on(device, matrix)


def constant_on(device: torch.device, values: Tensor) -> Tensor:
    """A copy on a device that every stream may read."""
    with torch.inference_mode(False):
        copy = values.to(device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return copy
