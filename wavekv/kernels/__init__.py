"""Kernels over pages, their statistics and codes: tensors in, tensors out, no state.

`reference`, `reference_levels` and `reference_search` are the readable torch definitions,
`dispatch`, `levels` and `search` the public functions, `backend` picks between torch and numba. No
numba loads here.
"""

from wavekv.kernels.backend import use_backend
from wavekv.kernels.dispatch import (
    attend_dense,
    attend_pages,
    merge_state,
    merge_state_,
    project,
    select,
    value_slope,
)
from wavekv.kernels.search import SearchParts, checked, score_means, search_pages

__all__ = [
    "SearchParts",
    "attend_dense",
    "attend_pages",
    "checked",
    "merge_state",
    "merge_state_",
    "project",
    "score_means",
    "search_pages",
    "select",
    "use_backend",
    "value_slope",
]
