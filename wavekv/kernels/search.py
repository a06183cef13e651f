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
    blocks = (heads, pages // 16, width // 4, 16, 4)
    checks.expect_part("codes", codes, blocks, torch.uint8, like=query)
    checks.expect_part("scale", scale, (heads, 16 * codes.shape[1]), torch.float32, like=query)
    means: Tensor = _backend(query, codes).score_means(query, codes, scale, num_threads=num_threads)
    return means


def search_pages(
    query: Tensor,
    turned: Tensor,
    given: Tensor | None,
    mean_codes: Tensor,
    mean_scale: Tensor,
    spread: Tensor,
    codes: Tensor,
    code_scale: Tensor,
    page_scale: Tensor,
    keys: Tensor,
    ids: Tensor,
    tail: Tensor,
    *,
    k: int,
    max_pages: int,
    num_candidates: int,
    optimism: float,
    num_threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The `k` keys of the highest inner product among those of some pages, and the tail.

    The pages are given, or the `max_pages` whose product with the mean, plus `optimism` times
    spread times the query's length, is highest. Their keys are scored by codes; the best
    `num_candidates` of them, and all of the tail, by themselves. If the pages are not given and
    `max_pages` is all, no code is read and every key is a candidate. Of equal products the lower id
    goes first.

    query: [H, Q, D], and turned: [H, Q, W'], the same in the space of the codes, W' a multiple of
    8. given: [H, Q, M] int64 pages, then -1 as padding, or None. mean_codes: [H, N / 16, W' / 4,
    16, 4] uint8 and mean_scale: [H, N] float32 (see `MeanCodes`). spread: [H, N] float32.
    codes: [H, N, W / 8, P, 4] uint8, W <= W', code_scale: [H, N, P] uint8 and page_scale: [H, N]
    float32 (see `KeyCodes`). keys: [H, N, P, D], a view with any strides (rows contiguous). ids:
    [H, N, P] int32, a permutation of 0 .. N P - 1 in each head. tail: [H, T, D], keys with ids from
    N P on. Each of them is contiguous but for its heads.
    Returns scores [H, Q, k] float32 and ids [H, Q, k] int64, the best first, padded with -inf and
    -1; how many there are, and pages scanned, [H, Q] int64.
    """
    heads, pages, page_size, width = keys.shape
    if query.dim() != 3 or query.shape[0] != heads or query.shape[2] != width:
        raise ValueError(f"query must be [H={heads}, Q, D={width}], got {tuple(query.shape)}")
    if k < 1 or num_candidates < 0 or max_pages < 0:
        raise ValueError(
            "expected k >= 1, num_candidates >= 0 and max_pages >= 0, got "
            f"{k}, {num_candidates} and {max_pages}"
        )
    shape, mean_width = (heads, query.shape[1]), turned.shape[-1]
    rows, groups = (heads, pages), codes.shape[2]
    checks.expect("turned", turned, (*shape, mean_width), torch.float32, like=keys)
    if given is not None:
        checks.expect("given", given, (*shape, given.shape[-1]), torch.int64, like=keys)
    if mean_width % 8 or mean_width < 8 * groups:
        raise ValueError(
            f"turned must have a multiple of 8 and at least {8 * groups} dimensions, "
            f"got {mean_width}"
        )
    blocks = (heads, pages // 16, mean_width // 4, 16, 4)
    checks.expect_part("mean_codes", mean_codes, blocks, torch.uint8, like=keys)
    checks.expect_part("mean_scale", mean_scale, rows, torch.float32, like=keys)
    checks.expect_part("spread", spread, rows, torch.float32, like=keys)
    checks.expect_part("codes", codes, (*rows, groups, page_size, 4), torch.uint8, like=keys)
    checks.expect_part("code_scale", code_scale, (*rows, page_size), torch.uint8, like=keys)
    checks.expect_part("page_scale", page_scale, rows, torch.float32, like=keys)
    checks.expect_part("ids", ids, (*rows, page_size), torch.int32, like=keys)
    checks.expect_part("tail", tail, (heads, tail.shape[1], width), keys.dtype, like=keys)
    checks.expect_stored("keys", keys)
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _backend(query, keys).search_pages(
        query,
        turned,
        given,
        mean_codes,
        mean_scale,
        spread,
        codes,
        code_scale,
        page_scale,
        keys,
        ids,
        tail,
        k=k,
        max_pages=max_pages,
        num_candidates=num_candidates,
        optimism=optimism,
        num_threads=num_threads,
    )
    return found


def _backend(*tensors: Tensor) -> ModuleType:
    if not uses_numba(*tensors):
        return reference_search
    from wavekv.kernels import cpu

    return cpu
