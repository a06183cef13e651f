"""What a step reads of the index of a page, in bytes."""

from __future__ import annotations

from wavekv.kernels.page_index import PageIndex

RANKING = (
    *("counts", "variance", "mean", "mean_step"),
    *("block_mean", "block_mean_scale"),
)
"""Of every page, to score it."""
CANDIDATE = ("high", "key_step", "value", "value_step")
"""Of a candidate, to score it again and to estimate it."""
FINALIST = ("high", "low", "key_step")
"""Of a finalist, to score it once more."""
BLOCKS = ("block_value", "block_value_scale")
"""Of every page, to estimate it."""


def index_page_bytes(summary: PageIndex, names: tuple[str, ...]) -> float:
    """Bytes of these parts for a page of one KV head; a part of a block is shared by its pages."""
    heads, pages = summary.counts.shape[1:]
    batch = summary.counts.shape[0]
    return sum(getattr(summary, name).nbytes for name in names) / (batch * heads * pages)
