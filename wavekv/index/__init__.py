"""Which keys matter: clustering keys into pages, coding them, searching them, and measures of it.

`WaveIndex` is a library of its own; the offload engine uses the functions under it.
"""

from wavekv.index.clustering import balanced_pages
from wavekv.index.codes import KeyCodes, encode_keys
from wavekv.index.exact import exact_search, recall_at_k
from wavekv.index.measures import attention_recall, relative_error
from wavekv.index.params import IndexParams
from wavekv.index.result import AttendResult, SearchResult
from wavekv.index.statistics import PageStatistics, page_scatter, page_statistics
from wavekv.index.wave import WaveIndex

__all__ = [
    "AttendResult",
    "IndexParams",
    "KeyCodes",
    "PageStatistics",
    "SearchResult",
    "WaveIndex",
    "attention_recall",
    "balanced_pages",
    "encode_keys",
    "exact_search",
    "page_scatter",
    "page_statistics",
    "recall_at_k",
    "relative_error",
]
