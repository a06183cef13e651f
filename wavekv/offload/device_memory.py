"""What there is of device memory, and what contexts take of it."""

from __future__ import annotations

import torch

from wavekv.config import OffloadConfig, parse_size
from wavekv.index.scatter import pages_of_span
from wavekv.kernels.means import KEY_BITS, VALUE_BITS


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
    """Bytes of index on a CUDA device for each token in pages, of one KV head of one layer."""
    P, D = config.page_size, head_dim
    means = D * (KEY_BITS + VALUE_BITS) / 8
    # scales of both means, the variance, the count, the scale of the codes
    numbers = 5 * 4
    codes = -(-D // 8) * 4 * P + P
    span = pages_of_span(config.segment, P, D)
    return (means + numbers + codes + 8 * D * D / span) / P
