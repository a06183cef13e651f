"""The kernels of a decode step in Triton, beside their torch twins in
`wavekv.kernels.step_reference`.

Importing this needs triton.
"""

from wavekv.kernels.cuda.attend import attend, merge
from wavekv.kernels.cuda.estimate import estimate
from wavekv.kernels.cuda.likely import list_likely
from wavekv.kernels.cuda.rank import rank_pages
from wavekv.kernels.cuda.refine import refine
from wavekv.kernels.cuda.resolve import resolve, settle
from wavekv.kernels.cuda.score import score
from wavekv.kernels.cuda.select import pick, select
from wavekv.kernels.cuda.slope import value_slope
from wavekv.kernels.cuda.transfer import fetch, store

__all__ = [
    "attend",
    "estimate",
    "fetch",
    "list_likely",
    "merge",
    "pick",
    "rank_pages",
    "refine",
    "resolve",
    "score",
    "select",
    "settle",
    "store",
    "value_slope",
]
