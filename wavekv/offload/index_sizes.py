"""Sizes of the index of a layer, from its settings alone (pure)."""

from __future__ import annotations

from wavekv.config import OffloadConfig
from wavekv.index.levels import block_pages
from wavekv.index.scatter import pages_of_span


def index_sizes(config: OffloadConfig, head_dim: int) -> tuple[int, int]:
    """Pages of a span, a multiple of those of a block, and pages of a block."""
    K = block_pages(config.append_segment, config.page_size)
    return pages_of_span(config.segment, config.page_size, head_dim, K), K
