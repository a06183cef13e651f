"""The host arena as kernels on the device see it: the addresses of its chunks."""

from __future__ import annotations

import torch

from wavekv.kernels.step import StepArena
from wavekv.kvstore import PageArena


class HostChunks:
    """Addresses at a fixed place on the device, with room for all chunks that the budget allows."""

    def __init__(self, arena: PageArena, device: torch.device) -> None:
        self._host = arena.host
        self._addresses = torch.zeros(self._host.max_chunks, dtype=torch.int64, device=device)
        self._num_told = 0
        self.arena = StepArena(self._addresses, self._host.pages_per_chunk, self._host.chunks)
        self.refresh()

    def refresh(self) -> None:
        """Tell the device of chunks that the arena has got."""
        chunks = self._host.chunks
        if len(chunks) > self._num_told:
            new = [chunk.data_ptr() for chunk in chunks[self._num_told :]]
            addresses = torch.tensor(new, device=self._addresses.device)
            self._addresses[self._num_told : len(chunks)] = addresses
            self._num_told = len(chunks)
