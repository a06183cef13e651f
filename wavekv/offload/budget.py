"""How many pages a step may retrieve, and how a stretch of tokens is cut into segments (pure)."""

from __future__ import annotations

import math

from wavekv.config import OffloadConfig


def page_limits(config: OffloadConfig, num_tokens: int) -> tuple[int, int]:
    """(least, most) pages that a KV head retrieves in a step over `num_tokens` of context."""
    page = config.page_size
    floor = -(-config.min_budget // page)
    if isinstance(config.budget, float):
        most = max(math.ceil(config.budget * num_tokens / page), floor)
    else:
        most = -(-config.budget // page)
    return min(floor, most), most


def cut_segments(num_tokens: int, *, segment: int, smallest: int) -> list[int]:
    """Cut `num_tokens` into segment lengths, longest first, all `smallest` times a power of two.

    No length exceeds `segment`; what does not fill `smallest` is left out.
    """
    lengths = []
    while num_tokens >= smallest:
        length = min(segment, smallest << (num_tokens // smallest).bit_length() - 1)
        lengths.append(length)
        num_tokens -= length
    return lengths
