"""How fast CPU memory is read."""

from __future__ import annotations

import torch

from wavekv.kvstore import available_memory
from wavekv.machine.clock import best_seconds

_MOST_BYTES = 1 << 30
"""More than caches hold."""


def host_read() -> float:
    """Bytes a second of a sum over a large tensor, by all threads of torch."""
    size = min(_MOST_BYTES, max(1 << 24, available_memory() // 8))
    numbers = torch.zeros(size // 4, dtype=torch.float32)
    return numbers.nbytes / best_seconds(numbers.sum, repeats=3)
