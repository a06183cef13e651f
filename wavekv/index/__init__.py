"""Which keys matter: clustering keys into pages, page statistics, and measures of a choice."""

from wavekv.index.clustering import balanced_pages
from wavekv.index.codes import KeyCodes, encode_keys
from wavekv.index.measures import attention_recall, relative_error
from wavekv.index.statistics import PageStatistics, page_scatter, page_statistics

__all__ = [
    "KeyCodes",
    "PageStatistics",
    "attention_recall",
    "balanced_pages",
    "encode_keys",
    "page_scatter",
    "page_statistics",
    "relative_error",
]
