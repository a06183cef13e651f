"""The public kernels of a key search: validate, then numba for CPU tensors, torch elsewhere.

Letters beyond those of `wavekv.kernels.reference`: H heads, Q queries of each, W the dimensions of
codes, a multiple of 8. `num_threads` caps the threads of a launch on a CPU; None is as many as
torch uses. Results never depend on it.
"""

from types import ModuleType
from typing import NamedTuple

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


class SearchParts(NamedTuple):
    """What a search reads of an index; each contiguous but for its heads. `checked` once, searched
    often."""

    mean_codes: Tensor
    """[H, N / 16, W' / 4, 16, 4] uint8, see `MeanCodes`."""
    mean_scale: Tensor
    """[H, N] float32"""
    spread: Tensor
    """[H, N] float32: deviation of a page's keys from the mean, in any one direction."""
    codes: Tensor
    """[H, N, W / 8, P, 4] uint8, W <= W', see `KeyCodes`."""
    code_scale: Tensor
    """[H, N, P] uint8"""
    page_scale: Tensor
    """[H, N] float32"""
    keys: Tensor
    """[H, N, P, D], a view with any strides (rows contiguous)."""
    ids: Tensor
    """[H, N, P] int32, a permutation of 0 .. N P - 1 in each head."""
    tail: Tensor
    """[H, T, D], keys with ids from N P on."""
    addresses: tuple[tuple[int, ...], ...] = ()
    """Where the numba kernels find them: from `checked`."""


def checked(parts: SearchParts) -> SearchParts:
    """The parts of an index, ready to be searched as long as they stay where they are.

    Raises:
        ValueError: they do not fit each other.
    """
    keys = parts.keys
    if keys.dim() != 4 or keys.dtype not in checks.STORED_DTYPES:
        raise ValueError(
            f"keys must be [H, N, P, D] float32, bfloat16 or float16, got {tuple(keys.shape)} "
            f"{keys.dtype}"
        )
    checks.expect_rows("keys", keys)
    heads, pages, page_size, width = keys.shape
    if pages % 16:
        raise ValueError(f"pages must come in blocks of 16, got {pages}")
    rows = (heads, pages)
    groups, mean_groups = parts.codes.shape[2], parts.mean_codes.shape[2]
    if 8 * groups > 4 * mean_groups or 4 * mean_groups < width:
        raise ValueError(
            f"codes must have at most as many dimensions as mean_codes, and those at least {width},"
            f" got {8 * groups} and {4 * mean_groups}"
        )
    for name, shape, dtype in (
        ("mean_codes", (heads, pages // 16, mean_groups, 16, 4), torch.uint8),
        ("mean_scale", rows, torch.float32),
        ("spread", rows, torch.float32),
        ("codes", (*rows, groups, page_size, 4), torch.uint8),
        ("code_scale", (*rows, page_size), torch.uint8),
        ("page_scale", rows, torch.float32),
        ("ids", (*rows, page_size), torch.int32),
        ("tail", (heads, parts.tail.shape[1], width), keys.dtype),
    ):
        checks.expect_part(name, getattr(parts, name), shape, dtype, like=keys)
    if keys.device.type != "cpu":
        return parts
    from wavekv.kernels import cpu

    return parts._replace(addresses=cpu.search_addresses(*parts[:-1]))


def search_pages(
    query: Tensor,
    turned: Tensor,
    given: Tensor | None,
    parts: SearchParts,
    *,
    k: int,
    max_pages: int,
    num_candidates: int,
    optimism: float,
    num_threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The `k` keys of the highest inner product among those of some pages, and the tail.

    The pages are given, or the `max_pages` whose product with the mean, plus `optimism` times
    spread times the query's length, is highest. Their keys are scored by codes; the best
    `num_candidates` of them, and all of the tail, by themselves. If the pages are not given and
    `max_pages` is all, no code is read and every key is a candidate. Of equal products the lower id
    goes first.

    query: [H, Q, D], and turned: [H, Q, W'], the same in the space of the codes; float32. given:
    [H, Q, M] int64 pages, then -1 as padding, or None. parts: see `SearchParts`.
    Returns scores [H, Q, k] float32 and ids [H, Q, k] int64, the best first, padded with -inf and
    -1; work [4, H, Q] int64: how many there are, pages scored, keys scanned, and keys compared, the
    tail among both.
    """
    keys = parts.keys
    shape = (keys.shape[0], query.shape[1])
    checks.expect("query", query, (*shape, keys.shape[3]), torch.float32, like=keys)
    width = 4 * parts.mean_codes.shape[2]
    checks.expect("turned", turned, (*shape, width), torch.float32, like=keys)
    if given is not None:
        most = min(given.shape[-1], keys.shape[1])
        checks.expect("given", given, (*shape, most), torch.int64, like=keys)
    if k < 1 or num_candidates < 0 or max_pages < 0:
        raise ValueError(
            "expected k >= 1, num_candidates >= 0 and max_pages >= 0, got "
            f"{k}, {num_candidates} and {max_pages}"
        )
    found: tuple[Tensor, Tensor, Tensor] = _backend(query, keys).search_pages(
        query,
        turned,
        given,
        parts,
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
