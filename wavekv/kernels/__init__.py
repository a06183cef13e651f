"""Attention kernels over pages and their statistics: tensors in, tensors out, no state.

`reference` is the readable torch definition, `dispatch` picks the backend. No numba loads here.
"""

from wavekv.kernels.backend import use_backend
from wavekv.kernels.dispatch import (
    attend_dense,
    attend_pages,
    estimate,
    merge_state,
    refine,
    score,
    select,
    value_slope,
)
from wavekv.kernels.search import SearchParts, checked, score_means, search_pages

__all__ = [
    "SearchParts",
    "attend_dense",
    "attend_pages",
    "checked",
    "estimate",
    "merge_state",
    "refine",
    "score",
    "score_means",
    "search_pages",
    "select",
    "use_backend",
    "value_slope",
]
