"""Where key and value bytes live: page layout, the tiers of memory and files, their budgets."""

from wavekv.kvstore.arena import HostArena
from wavekv.kvstore.budget import MemoryBudget, available_memory
from wavekv.kvstore.disk_tier import SavedPages
from wavekv.kvstore.layout import CODEC_BITS, KVLayout
from wavekv.kvstore.mapped import MappedArena
from wavekv.kvstore.tiered import TieredArena

PageArena = HostArena | TieredArena
"""Pages by id, in one tier or in two."""

__all__ = [
    "CODEC_BITS",
    "HostArena",
    "KVLayout",
    "MappedArena",
    "MemoryBudget",
    "PageArena",
    "SavedPages",
    "TieredArena",
    "available_memory",
]
