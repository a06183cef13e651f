"""Kernels over pages, their statistics and codes: tensors in, tensors out, no state.

`reference` and `reference_search` are the readable torch definitions, `dispatch` and `search` the
public functions, `backend` picks between torch and numba. No numba loads here.
"""

from wavekv.kernels.backend import use_backend
from wavekv.kernels.dispatch import (
    attend_dense,
    attend_pages,
    estimate,
    merge_state,
    merge_state_,
    project,
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
    "merge_state_",
    "project",
    "refine",
    "score",
    "score_means",
    "search_pages",
    "select",
    "use_backend",
    "value_slope",
]
