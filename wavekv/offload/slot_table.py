"""Where host memory has each page, on the device: for pages in tiers, whose place changes."""

from __future__ import annotations

import torch

from wavekv.kvstore import TieredArena


class SlotTable:
    """Slots [capacity] int64 of the pages of an arena by id, -1 for those that only the disk has;
    at a fixed address, so that a CUDA graph can read it."""

    def __init__(self, arena: TieredArena, capacity: int, device: torch.device) -> None:
        """capacity: more than any id will be."""
        self._arena, self._changes = arena, arena.watch()
        self.slots = torch.full((capacity,), -1, dtype=torch.int64, device=device)
        held = arena.slots_of(torch.arange(min(capacity, arena.ids.capacity)))
        self.slots[: len(held)] = held.to(device)

    @property
    def is_too_small(self) -> bool:
        """Whether the arena has ids beyond the capacity."""
        return self._arena.ids.capacity > len(self.slots)

    def refresh(self) -> None:
        """Bring it to where the arena is, in the order of the current stream."""
        ids = torch.from_numpy(self._changes.take())
        ids = ids[ids < len(self.slots)]
        if len(ids):
            both = torch.stack([ids, self._arena.slots_of(ids)])
            if self.slots.is_cuda:
                both = both.pin_memory()
            both = both.to(self.slots.device, non_blocking=True)
            self.slots.index_copy_(0, both[0], both[1])
