"""Attention kernels over pages and their statistics: tensors in, tensors out, no state.

`reference` is the readable torch definition, `dispatch` picks the backend. No numba loads here.
"""

from wavekv.kernels.dispatch import (
    attend_dense,
    attend_pages,
    estimate,
    merge_state,
    refine,
    score,
    select,
    use_backend,
    value_slope,
)

__all__ = [
    "attend_dense",
    "attend_pages",
    "estimate",
    "merge_state",
    "refine",
    "score",
    "select",
    "use_backend",
    "value_slope",
]
