"""How fast CPU memory is read, and pages gathered from the host arena."""

from __future__ import annotations

import torch

from wavekv.kvstore import HostArena, KVLayout, MemoryBudget, available_memory
from wavekv.machine.clock import best_seconds

_MOST_BYTES = 1 << 30
"""More than caches hold."""
_BUFFER_BYTES = 32 << 20
"""What a prefill brings at once."""


def host_read() -> float:
    """Bytes a second of a sum over a large tensor, by all threads of torch."""
    numbers = torch.zeros(_room() // 4, dtype=torch.float32)
    return numbers.nbytes / best_seconds(numbers.sum, repeats=3)


def host_gather(*, is_pinned: bool) -> float:
    """Bytes a second of pages of 4 KiB that `HostArena.gather` puts into one buffer."""
    layout = KVLayout(8, 128, torch.bfloat16)
    size = _room() // 4
    arena = HostArena(layout, MemoryBudget(8 * size), pin=False, chunk_bytes=size)
    ids = arena.allocate(size // layout.page_bytes)
    for chunk in arena.chunks:
        chunk.zero_()
    shape = _BUFFER_BYTES // layout.page_bytes, *layout.page_shape
    out = torch.empty(shape, dtype=layout.dtype, pin_memory=is_pinned)
    some = ids[torch.randperm(len(ids))[: len(out)]]
    out = out[: len(some)]
    return out.nbytes / best_seconds(lambda: arena.gather(some, out=out), repeats=3)


def _room() -> int:
    return min(_MOST_BYTES, max(1 << 24, available_memory() // 8))
