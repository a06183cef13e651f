"""How many pages a step may retrieve (pure)."""

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
