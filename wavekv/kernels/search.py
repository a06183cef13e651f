"""The public kernels of a key search: validate, then numba for CPU tensors, torch elsewhere.

Letters beyond those of `wavekv.kernels.reference`: H heads, Q queries of each, W the dimensions of
codes, a multiple of 8. `num_threads` caps the threads of a launch on a CPU; None is as many as
torch uses. Results never depend on it.
"""

from types import ModuleType

import torch
from torch import Tensor

from wavekv.kernels import checks, reference_search
from wavekv.kernels.backend import uses_numba


def score_means(
    query: Tensor, codes: Tensor, scale: Tensor, *, num_threads: int | None = None
) -> Tensor:
    """Inner products of queries with the means of all pages, from eight-bit codes.

    query: [H, Q, W], rounded to int8 for the product. codes: [H, N / 16, W / 4, 16, 4] uint8,
    contiguous from N on; scale: [H, N] float32, contiguous in N (see `MeanCodes`).
    Returns [H, Q, N] float32.
    """
    heads, pages = scale.shape
    width = query.shape[-1]
    if query.dim() != 3 or query.shape[0] != heads or width % 8:
        raise ValueError(
            f"query must be [H={heads}, Q, W] with W a multiple of 8, got {tuple(query.shape)}"
        )
    checks.expect("codes", codes, (heads, pages // 16, width // 4, 16, 4), torch.uint8, like=query)
    checks.expect("scale", scale, (heads, 16 * codes.shape[1]), torch.float32, like=query)
    checks.expect_inner("codes", codes, 4)
    checks.expect_inner("scale", scale, 1)
    means: Tensor = _backend(query, codes).score_means(query, codes, scale, num_threads=num_threads)
    return means


def top_pages(rank: Tensor, count: int, *, num_threads: int | None = None) -> Tensor:
    """The pages of the highest rank; of equal ranks the lower page goes first.

    rank: [H, Q, N] finite floats. Returns [H, Q, min(count, N)] int64, ascending.
    """
    if rank.dim() != 3 or count < 0:
        raise ValueError(
            f"rank must be [H, Q, N] and count at least 0, got {tuple(rank.shape)} and {count}"
        )
    chosen: Tensor = _backend(rank).top_pages(rank, count, num_threads=num_threads)
    return chosen


def search_pages(
    query: Tensor,
    code_query: Tensor,
    means: Tensor,
    chosen: Tensor,
    codes: Tensor,
    code_scale: Tensor,
    page_scale: Tensor,
    keys: Tensor,
    ids: Tensor,
    tail: Tensor,
    *,
    k: int,
    num_candidates: int,
    num_threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The `k` keys of the highest inner product among those of chosen pages, and the tail.

    The keys of the chosen pages are scored by their codes; the best `num_candidates` of them, and
    all of the tail, by themselves. Of equal products the lower id goes first.

    query: [H, Q, D] and code_query: [H, Q, W], the same in the space of the codes. means:
    [H, Q, N], products with the means in that space. chosen: [H, Q, M] int64 pages, then -1 as
    padding. codes: [H, N, W / 8, P, 4] uint8, code_scale: [H, N, P] uint8, page_scale: [H, N]
    float32 (see `KeyCodes`), all contiguous from N on. keys: [H, N, P, D], a view with any strides
    (rows contiguous). ids: [H, N, P] int32, contiguous from N on, a permutation of 0 .. N P - 1 in
    each head. tail: [H, T, D], keys with ids from N P on; rows contiguous.
    Returns scores [H, Q, k] float32 and ids [H, Q, k] int64, the best first, padded with -inf and
    -1, and how many there are, [H, Q] int64.
    """
    heads, pages, page_size, width = keys.shape
    if query.dim() != 3 or query.shape[0] != heads or query.shape[2] != width:
        raise ValueError(f"query must be [H={heads}, Q, D={width}], got {tuple(query.shape)}")
    shape = (heads, query.shape[1])
    checks.expect("code_query", code_query, (*shape, 8 * codes.shape[2]), torch.float32, like=keys)
    checks.expect("means", means, (*shape, pages), torch.float32, like=keys)
    checks.expect("chosen", chosen, (*shape, chosen.shape[-1]), torch.int64, like=keys)
    packed = (heads, pages, codes.shape[2], page_size, 4)
    checks.expect("codes", codes, packed, torch.uint8, like=keys)
    checks.expect("code_scale", code_scale, (*packed[:2], page_size), torch.uint8, like=keys)
    checks.expect("page_scale", page_scale, packed[:2], torch.float32, like=keys)
    checks.expect("ids", ids, (*packed[:2], page_size), torch.int32, like=keys)
    checks.expect("tail", tail, (heads, tail.shape[1], width), keys.dtype, like=keys)
    checks.expect_stored("keys", keys)
    checks.expect_rows("tail", tail)
    for name, part, inner in (
        ("codes", codes, 4),
        ("code_scale", code_scale, 2),
        ("page_scale", page_scale, 1),
        ("ids", ids, 2),
    ):
        checks.expect_inner(name, part, inner)
    if k < 1 or num_candidates < 0:
        raise ValueError(f"k must be at least 1, num_candidates 0, got {k} and {num_candidates}")
    found: tuple[Tensor, Tensor, Tensor] = _backend(query, keys).search_pages(
        *(query, code_query, means, chosen, codes, code_scale, page_scale, keys, ids, tail),
        k=k,
        num_candidates=num_candidates,
        num_threads=num_threads,
    )
    return found


def _backend(*tensors: Tensor) -> ModuleType:
    if not uses_numba(*tensors):
        return reference_search
    from wavekv.kernels import cpu

    return cpu
