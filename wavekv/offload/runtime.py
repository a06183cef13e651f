"""What the layers of one cache share: settings, host memory, and the page builder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import ref

import torch

from wavekv.config import OffloadConfig, parse_size
from wavekv.errors import ConfigError
from wavekv.kvstore import (
    HostArena,
    KVLayout,
    MappedArena,
    MemoryBudget,
    PageArena,
    SavedPages,
    TieredArena,
)
from wavekv.offload.builder import PageBuilder
from wavekv.offload.streaming import StreamBuffers

if TYPE_CHECKING:
    from wavekv.offload.engine import DecodeEngine


@dataclass(frozen=True, eq=False, slots=True)
class PrefillPlan:
    """What a prefill that has begun will need of every layer."""

    end: int
    """Tokens that the cache will hold."""
    chunk: int
    """Tokens that one forward takes."""
    resident_tokens: int = 0
    """Tokens in pages of which each layer may keep a copy on the device meanwhile."""
    room_tokens: int = 0
    """Tokens beyond `end` that the index has room for: those of steps to come."""


class OffloadRuntime:
    """Shared by the layers of a cache; arenas, budget and builder also by its forks."""

    def __init__(
        self, config: OffloadConfig, saved: Mapping[KVLayout, SavedPages] | None = None
    ) -> None:
        """saved: pages that arenas begin with."""
        self.config, self._saved = config, dict(saved or {})
        self.is_prefilling = False
        """While true, layers wait for whole segments instead of paging every append_segment."""
        self.plan: PrefillPlan | None = None
        """Of the prefill that runs. Layers order memory by it."""
        self.keeps_resident: bool | None = None
        """Whether a prefill keeps pages on the device; None for where that is a CUDA device. On a
        CPU the arena is as near."""
        self.buffers = StreamBuffers()
        self.budget = MemoryBudget.of_host(parse_size("cpu_budget", config.cpu_budget))
        self.disk_budget = _disk_budget(config)
        self.builder = PageBuilder()
        self._engine: ref[DecodeEngine] | None = None
        self.num_changes = 0
        """How often tokens were removed or sequences reordered."""
        self.arenas: dict[tuple[KVLayout, bool], PageArena] = {}

    def arena(self, head_dim: int, dtype: torch.dtype, device: torch.device) -> PageArena:
        """The arena for pages of a layer; pinned where `device` is a CUDA device.

        Raises:
            OSError: no file can be made in the folder `disk`.
        """
        layout = KVLayout(self.config.page_size, head_dim, dtype, self.config.host_dtype)
        key = layout, device.type == "cuda"
        if key not in self.arenas:
            self.arenas[key] = self._new_arena(layout, pin=key[1])
        return self.arenas[key]

    def _new_arena(self, layout: KVLayout, *, pin: bool) -> PageArena:
        saved = self._saved.get(layout)
        if self.config.disk is None and (saved is None or not pin):
            if saved is None:
                return HostArena(layout, self.budget, pin=pin)
            return MappedArena(layout, self.budget, saved)
        # what a device reads itself must be pinned, which mapped files are not
        folder = None if self.config.disk is None else os.fspath(self.config.disk)
        tiers = self.budget, self.disk_budget, folder
        return TieredArena(layout, *tiers, pin=pin, base=saved)

    def check_room(self, num_bytes: int) -> None:
        """Raise CapacityError if so many bytes of pages more fit neither tier."""
        arenas = self.arenas.values()
        held = sum((a.host.capacity - a.host.num_pages) * a.layout.page_bytes for a in arenas)
        lacking = max(0, num_bytes - held)
        if self.config.disk is None or lacking <= self.budget.free:
            self.budget.check(lacking)
            return
        # once they do not fit memory, all pages have a place on the disk
        tiers = [
            (a.disk, a.layout.page_bytes * a.num_own) for a in arenas if isinstance(a, TieredArena)
        ]
        self.disk_budget.check(num_bytes + sum(own - disk.nbytes for disk, own in tiers))

    @property
    def engine(self) -> DecodeEngine | None:
        """The engine that has the contexts, while decode steps are captured. A weak reference: the
        engine knows the contexts, and these the runtime."""
        return None if self._engine is None else self._engine()

    @engine.setter
    def engine(self, engine: DecodeEngine | None) -> None:
        self._engine = None if engine is None else ref(engine)

    def reclaim(self) -> None:
        """Have the engine give the contexts back, if it has them."""
        engine = self.engine
        if engine is not None:
            with torch.inference_mode(False), torch.no_grad():
                engine.give_back()
            self.engine = None

    def fork(self, config: OffloadConfig) -> OffloadRuntime:
        """A runtime over the same memory with other decode settings."""
        copy = object.__new__(OffloadRuntime)
        copy.config, copy.is_prefilling, copy.plan = config, False, None
        copy._saved = self._saved
        copy.keeps_resident, copy.buffers = self.keeps_resident, StreamBuffers()
        copy._engine, copy.num_changes = None, 0
        copy.budget, copy.disk_budget = self.budget, self.disk_budget
        copy.builder, copy.arenas = self.builder, self.arenas
        return copy


def _disk_budget(config: OffloadConfig) -> MemoryBudget:
    """Raises ConfigError if `disk` is no folder."""
    folder = None if config.disk is None else os.fspath(config.disk)
    if folder is not None and not os.path.isdir(folder):
        raise ConfigError(f"expected disk to be a folder, got {folder!r}; make it, or name another")
    return MemoryBudget.of_disk(parse_size("disk_budget", config.disk_budget), folder)
