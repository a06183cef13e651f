"""What a step asks the disk for: the pages that a layer chose and the device has not.

The choice is on the device and the disk is asked by the host, so a captured step is cut here: the
device writes what it wants to pinned memory, the host waits for that, has the pages brought to host
memory, and tells the device where they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wavekv.kernels.step import StepShape
from wavekv.kvstore import PageArena, TieredArena
from wavekv.offload.device_layer import DeviceLayer
from wavekv.offload.engine_shape import table_ids
from wavekv.offload.host_chunks import HostChunks
from wavekv.offload.slot_table import SlotTable


class DiskRequests:
    """The requests of the layers of an engine, one after another."""

    def __init__(
        self,
        arena: TieredArena,
        chunks: HostChunks,
        num_layers: int,
        shape: StepShape,
        deadline: float | None,
    ) -> None:
        """deadline: seconds that a layer waits for pages, None for as long as it takes."""
        self._arena, self._chunks, self._deadline = arena, chunks, deadline
        self._device = device = chunks.arena.chunks.device
        self.table = SlotTable(arena, table_ids(arena.ids.capacity, num_layers, shape), device)
        size = shape.batch, shape.kv_heads, shape.most
        is_cuda = device.type == "cuda"
        self._wanted = torch.full(size, -1, dtype=torch.int64, pin_memory=is_cuda)

    def ask(self, layer: DeviceLayer, chosen: Tensor) -> None:
        """On the device: write down the arena ids of pages chosen [B, Hkv, M] by a layer that are
        in no slot of its pool, -1 for others."""
        pages = chosen.clamp(min=0).long()
        is_wanted = (chosen >= 0) & (layer.pool.table.gather(2, pages) < 0)
        ids = layer.pages.arena_ids.gather(2, pages).masked_fill_(~is_wanted, -1)
        self._wanted.copy_(ids, non_blocking=True)

    def serve(self, layer: DeviceLayer) -> None:
        """On the host: bring what a layer asked for.

        Raises:
            CapacityError: cpu_budget does not hold so many pages.
            ContextFormatError: a page on the disk is damaged.
        """
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        wanted = self._wanted[self._wanted >= 0]
        if len(wanted):
            brought = self._arena.bring(wanted, self._deadline)
            counters = layer.context.counters
            counters.host_wanted += len(wanted)
            counters.host_missing += brought.num_read
        self._arena.read_ahead()
        self._chunks.refresh()
        self.table.refresh()


def disk_requests(
    arena: PageArena,
    chunks: HostChunks,
    num_layers: int,
    shape: StepShape,
    deadline: float | None,
) -> DiskRequests | None:
    """For an arena of two tiers; None for one that is all in memory."""
    if not isinstance(arena, TieredArena):
        return None
    return DiskRequests(arena, chunks, num_layers, shape, deadline)
