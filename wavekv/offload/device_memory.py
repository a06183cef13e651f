"""What there is of device memory, and what contexts take of it."""

from __future__ import annotations

import torch

from wavekv.config import OffloadConfig, parse_size
from wavekv.kernels.page_index import empty_index, pages_of_parts
from wavekv.offload.index_sizes import index_sizes


def free_memory(device: torch.device) -> int:
    """Bytes that are free, what torch holds for later allocations included."""
    if device.type != "cuda":
        return 1 << 40
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def device_budget(config: OffloadConfig, free: int) -> int:
    """`device_budget` in bytes, where `free` are free."""
    size = parse_size("device_budget", config.device_budget)
    return int(size * free) if isinstance(size, float) else size


def index_bytes(config: OffloadConfig, head_dim: int) -> float:
    """Bytes of the index for each token in pages, of one KV head of one layer."""
    D = head_dim
    span_pages, K = index_sizes(config, D)
    block = empty_index(torch.empty(1, 1, 0, D, device="meta"), config.page_size, K)
    entries = [part.new_empty(1, 1, 1, *part.shape[3:]).nbytes for part in block]
    page = sum(size / every for size, every in zip(entries, pages_of_parts(K), strict=True))
    return (page + 8 * D * D / span_pages) / config.page_size
