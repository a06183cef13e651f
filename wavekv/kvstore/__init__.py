"""Where key and value bytes live: page layout, the host arena and its budget, growing tensors."""

from wavekv.kvstore.arena import HostArena
from wavekv.kvstore.budget import MemoryBudget, available_memory
from wavekv.kvstore.growing import GrowingTensor
from wavekv.kvstore.layout import KVLayout

__all__ = ["GrowingTensor", "HostArena", "KVLayout", "MemoryBudget", "available_memory"]
