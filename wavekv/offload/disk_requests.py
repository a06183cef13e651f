"""What a step asks the disk for: the pages that a layer chose and the device has not.

The choice is on the device and the disk is asked by the host, so a captured step is cut here: the
device writes what it wants to pinned memory, the host waits for that, has the pages brought to host
memory, and tells the device where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wavekv.kernels.step import StepShape
from wavekv.kvstore import TieredArena
from wavekv.offload.device_layer import DeviceLayer
from wavekv.offload.slot_table import SlotTable


class DiskRequests:
    """The requests of all layers of an engine."""

    def __init__(
        self,
        arena: TieredArena,
        table: SlotTable,
        layers: Sequence[DeviceLayer],
        shape: StepShape,
        *,
        deadline: float | None,
        refresh_chunks: Callable[[], None],
    ) -> None:
        """deadline: seconds that a layer waits for pages. refresh_chunks: tells the device of new
        chunks of the arena."""
        self._arena, self._table, self._layers = arena, table, layers
        self._deadline, self._refresh_chunks = deadline, refresh_chunks
        device = table.slots.device
        size = shape.batch, shape.kv_heads, shape.most
        is_cuda = device.type == "cuda"
        self._wanted = torch.full(size, -1, dtype=torch.int64, pin_memory=is_cuda)
        self._device = device

    def ask(self, number: int, chosen: Tensor) -> None:
        """On the device: write down the arena ids of pages chosen [B, Hkv, M] by layer `number`
        that are in no slot of its pool, -1 for others."""
        layer = self._layers[number]
        pages = chosen.clamp(min=0).long()
        is_wanted = (chosen >= 0) & (layer.pool.table.gather(2, pages) < 0)
        ids = layer.pages.arena_ids.gather(2, pages).masked_fill_(~is_wanted, -1)
        self._wanted.copy_(ids, non_blocking=True)

    def serve(self, number: int) -> None:
        """On the host: bring what layer `number` asked for.

        Raises:
            CapacityError: cpu_budget does not hold so many pages.
            ContextFormatError: a page on the disk is damaged.
        """
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        wanted = self._wanted[self._wanted >= 0]
        if not len(wanted):
            return
        brought = self._arena.bring(wanted, self._deadline)
        counters = self._layers[number].context.counters
        counters.host_wanted += len(wanted)
        counters.host_missing += brought.num_read
        self._refresh_chunks()
        self._table.refresh()
