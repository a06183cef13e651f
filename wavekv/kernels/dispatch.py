"""The public kernels: validate, then run numba for CPU tensors and the torch reference elsewhere.

The kernels know no configuration and keep no state. `wavekv.kernels.reference` defines the letters
and the attention state; `wavekv.kernels.levels` has the kernels over an index of pages. Queries
and log masses may have any float dtype; pages, keys and values are float32, bfloat16 or float16;
the maths is float32. Results carry no gradient. A wrong shape, dtype or device is a ValueError that
says what was expected and what came.
"""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from wavekv.kernels import checks, reference
from wavekv.kernels.backend import uses_numba
from wavekv.kernels.checks import STORED_DTYPES
from wavekv.kernels.page_codec import PageCodec

State = tuple[Tensor, Tensor]


def select(
    log_mass: Tensor,
    num_kv_heads: int,
    *,
    max_pages: int,
    min_pages: int = 0,
    top_p: float | None = None,
) -> Tensor:
    """Choose the pages that each KV head attends to exactly.

    A page's rank is the sum over the query heads of its group of the softmax over pages of
    log_mass; of equal ranks the lower index goes first. An empty page (-inf for the whole group) is
    never chosen.

    log_mass: [B, Hq, N] as from `score_levels`. max_pages: the most pages per KV head. top_p in
    (0, 1]: take the fewest pages that hold this share of the rank, within min_pages and max_pages;
    None takes max_pages, and min_pages has no effect.
    Returns page_index [B, Hkv, M] int64, M = min(max_pages, N), ascending, then -1 as padding.
    """
    if log_mass.dim() != 3:
        raise ValueError(f"log_mass must be [B, Hq, N], got {tuple(log_mass.shape)}")
    checks.expect_heads("log_mass", log_mass, log_mass.shape[0], num_kv_heads, log_mass.shape[2])
    if not 0 <= min_pages <= max_pages:
        raise ValueError(f"expected 0 <= min_pages <= max_pages, got {min_pages} and {max_pages}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1] or None, got {top_p}")
    run = _backend(log_mass).select
    page_index: Tensor = run(
        log_mass, num_kv_heads, max_pages=max_pages, min_pages=min_pages, top_p=top_p
    )
    return page_index


def attend_pages(
    query: Tensor,
    chunks: Sequence[Tensor],
    page_ids: Tensor,
    counts: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    codec: PageCodec | None = None,
) -> State:
    """Exact attention over pages, read in place.

    query: [B, Hq, D]. chunks: contiguous tensors [C, 2, P, D] of one shape; page i is
    chunks[i // C][i % C], its keys at [0], its values at [1]; may be empty if M = 0. page_ids:
    [B, Hkv, M] int64 in any order, -1 for nothing. counts: [B, Hkv, M] int32; only the first
    `counts` tokens of a page are read. codec: pages are stored in this form instead, in chunks
    [C, page_bytes] uint8.
    Returns the state: out [B, Hq, D], lse [B, Hq], float32.
    On the CPU backend an id beyond the chunks, or a count beyond P, is an IndexError.
    """
    if query.dim() != 3 or page_ids.dim() != 3:
        raise ValueError(
            f"query must be [B, Hq, D] and page_ids [B, Hkv, M], "
            f"got {tuple(query.shape)} and {tuple(page_ids.shape)}"
        )
    shape = tuple(page_ids.shape)
    checks.expect_heads("query", query, shape[0], shape[1], query.shape[2])
    checks.expect("page_ids", page_ids, shape, torch.int64, like=query)
    checks.expect("counts", counts, shape, torch.int32, like=query)
    checks.expect_softcap(softcap)
    if shape[2] == 0:
        out = torch.zeros_like(query, dtype=torch.float32)
        return out, out.new_full(out.shape[:2], -torch.inf)
    checks.expect_chunks(chunks, query, codec)
    run = _backend(query).attend_pages
    state: State = run(query, chunks, page_ids, counts, scale=scale, softcap=softcap, codec=codec)
    return state


def attend_dense(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
) -> State:
    """Exact attention over dense keys and values, read in place.

    query: [B, Hq, D]. keys, values: [B, Hkv, S, D], views with any strides (rows contiguous); S may
    be 0. valid: [B, S] bool, False for tokens that must not be read, or None.
    Returns the state: out [B, Hq, D], lse [B, Hq], float32.
    """
    checks.expect_stored("keys", keys)
    shape = tuple(keys.shape)
    checks.expect_heads("query", query, shape[0], shape[1], shape[3])
    checks.expect("values", values, shape, *STORED_DTYPES, like=keys)
    checks.expect_rows("values", values)
    if valid is not None:
        checks.expect("valid", valid, (shape[0], shape[2]), torch.bool, like=keys)
    checks.expect_softcap(softcap)
    run = _backend(query, keys).attend_dense
    state: State = run(query, keys, values, valid, scale=scale, softcap=softcap)
    return state


def value_slope(query: Tensor, scatter: Tensor, *, scale: float) -> Tensor:
    """How much values change with the logit of their keys, inside the pages of each span.

    The least-squares fit of values (less the mean of their page) to one number, the logit of their
    key (less that of the page's mean), over all tokens of a span: with the within-page scatters K
    of keys and C of values with keys, C q / (q^T K q). A ridge of 1 % of sum_d q_d^2 K_dd bounds
    the slope where keys hardly vary along the query. One matrix product: torch for every backend.

    query: [B, Hq, D]. scatter: [B, Hkv, S, 2, D, D] bfloat16, K and C of each span (see
    `wavekv.index.page_scatter`). scale multiplies the logits. Sums are made in float32.
    Returns slope [B, Hq, S, D] float32, a change of value per unit of logit before any soft cap.
    """
    if scatter.dim() != 6 or scatter.shape[3] != 2:
        raise ValueError(f"scatter must be [B, Hkv, S, 2, D, D], got {tuple(scatter.shape)}")
    batch, kv_heads, spans, _, width, _ = scatter.shape
    checks.expect_heads("query", query, batch, kv_heads, width)
    expected = (batch, kv_heads, spans, 2, width, width)
    checks.expect("scatter", scatter, expected, torch.bfloat16, like=query)
    return reference.value_slope(query, scatter, scale=scale)


def project(x: Tensor, weight: Tensor) -> Tensor:
    """Inner products of the rows of each block with their weighted sum: a step of the power method,
    or of two-means, for many blocks at once. The sum is scaled to a largest component of 1, so
    that no power of it overflows or vanishes.

    x: [b, n, D] and weight: [b, n], float32. Returns [b, n] float32. Blocks do not influence each
    other.
    """
    if x.dim() != 3 or x.dtype != torch.float32:
        raise ValueError(f"x must be [b, n, D] float32, got {tuple(x.shape)} {x.dtype}")
    checks.expect("weight", weight, tuple(x.shape[:2]), torch.float32, like=x)
    scores: Tensor = _backend(x, weight).project(x, weight)
    return scores


def merge_state(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> State:
    """Join the states over two disjoint sets of tokens into the state over their union.

    Exact; associative and commutative up to rounding; the empty state is the identity. The name is
    FlashInfer's.

    out_a, out_b: [..., D]. lse_a, lse_b: [...], natural logarithm.
    Returns the state: out [..., D], lse [...], float32.
    """
    if out_a.shape != out_b.shape or not lse_a.shape == lse_b.shape == out_a.shape[:-1]:
        raise ValueError(_unlike_states(out_a, lse_a, out_b, lse_b))
    state: State = _backend(out_a, lse_a, out_b, lse_b).merge_state(out_a, lse_a, out_b, lse_b)
    return state


def merge_state_(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> State:
    """`merge_state` into the memory of the first state, where the device has a kernel for it.

    out_a: [B, H, T, D] float32, contiguous; lse_a: [B, H, T] float32, contiguous. out_b may have
    any float dtype and strides. Returns the state; the first must not be used afterwards.
    """
    if out_a.is_cuda and _has_triton():
        from wavekv.kernels.cuda.states import merge_into

        if out_a.shape != out_b.shape or not lse_a.shape == lse_b.shape == out_a.shape[:-1]:
            raise ValueError(_unlike_states(out_a, lse_a, out_b, lse_b))
        merge_into(out_a, lse_a, out_b, lse_b)
        return out_a, lse_a
    return merge_state(out_a, lse_a, out_b, lse_b)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _unlike_states(*parts: Tensor) -> str:
    return "states must be out [..., D], lse [...] of the same shape, got " + ", ".join(
        str(tuple(part.shape)) for part in parts
    )


def _backend(*tensors: Tensor) -> ModuleType:
    """The module whose functions run for these tensors. numba loads on first use."""
    if not uses_numba(*tensors):
        return reference
    from wavekv.kernels import cpu

    return cpu
