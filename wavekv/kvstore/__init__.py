"""Where key and value bytes live: page layout, the host arena and its budget."""

from wavekv.kvstore.arena import HostArena
from wavekv.kvstore.budget import MemoryBudget, available_memory
from wavekv.kvstore.layout import CODEC_BITS, KVLayout

__all__ = ["CODEC_BITS", "HostArena", "KVLayout", "MemoryBudget", "available_memory"]
