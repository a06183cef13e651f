"""The public kernels: validate, then run numba for CPU tensors and the torch reference elsewhere.

The kernels know no configuration and keep no state. `wavekv.kernels.reference` defines the letters
and the attention state. Queries and log masses may have any float dtype; pages, keys, values and
their means are float32, bfloat16 or float16; the maths is float32. Results carry no gradient. A
wrong shape, dtype or device is a ValueError that says what was expected and what came.
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


def score(
    query: Tensor,
    mean: Tensor,
    variance: Tensor | None,
    counts: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Estimate each page's softmax mass from its statistics: log of the sum of exp(logit).

    A page of n keys has log mass log n + x + c. x is the logit of the mean key, soft-capped where
    the model does so; c is the log of the mean of exp(logit - x). The variance of the logits is
    s = |q|^2 * variance, q scaled, as if keys varied alike in all directions (by the delta method
    under a soft cap). Gaussian keys have c = s / 2. But n samples cannot realise that mean once s >
    2 log n: there the largest of them carries the sum and c = sqrt(2 log n * s) - log n, the
    freezing of the random energy model (Derrida, Phys. Rev. B 24, 2613, 1981). The branches meet
    with one slope, and a page of one key has c = 0. Without variance c = 0, which is the estimate
    of RetroInfer (VLDB 19(5), section 4.2).

    The shift of a page is how far the mean logit of its keys rises when they are weighted by their
    mass: s for Gaussian keys, sqrt(2 log n * s) where c is frozen (the derivative of c by the
    query's length), 0 without variance. Under a soft cap it is that of the logits before the cap:
    the above over the cap's derivative. `estimate` needs it for the values.

    query: [B, Hq, D]. mean: [B, Hkv, N, D], of the keys. variance: [B, Hkv, N] float32, of the
    keys, the mean over the dimensions, or None. counts: [B, Hkv, N] int32, tokens in each page. The
    last three may be views with any strides (rows of mean contiguous); they are read in place.
    scale multiplies the logits, then softcap bends them to softcap * tanh(logit / softcap).
    Returns log_mass and shift, both [B, Hq, N] float32. log_mass is a natural logarithm; where
    counts is 0, they are -inf and 0, whatever the rest.
    """
    checks.expect_stored("mean", mean)
    shape = tuple(mean.shape)
    checks.expect_heads("query", query, shape[0], shape[1], shape[3])
    if variance is not None:
        checks.expect("variance", variance, shape[:3], torch.float32, like=mean)
    checks.expect("counts", counts, shape[:3], torch.int32, like=mean)
    checks.expect_softcap(softcap)
    run = _backend(query, mean).score
    scored: tuple[Tensor, Tensor] = run(query, mean, variance, counts, scale=scale, softcap=softcap)
    return scored


def refine(
    query: Tensor,
    code_query: Tensor,
    log_mass: Tensor,
    shift: Tensor,
    mean: Tensor,
    codes: Tensor,
    code_scale: Tensor,
    page_scale: Tensor,
    counts: Tensor,
    candidates: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Replace the estimated mass and shift of candidate pages by what their quantised keys give.

    A mean hides a single key that fits the query among others that do not; codes of each key show
    it. Key p of a page is mean + page_scale * code_scale[p] / 255 * (code - 8), code in 0..15.
    The mean of the keys is the page's, exactly: what their codes make of it is taken off. The shift
    is the mean logit of these keys, before the cap, weighted by their mass, less the plain mean.
    For the codes, not for the mean, the query is rounded to int8: an error of at most 1/254 of its
    largest component, far below that of the codes.

    query: [B, Hq, D]. code_query: [B, Hq, D'], the same query in the space of the codes; the query
    itself where they have none of their own. log_mass, shift: [B, Hq, N] as from `score`. mean:
    [B, Hkv, N, D]. codes: [B, Hkv, N, W / 8, P, 4] uint8, contiguous from W / 8 on, W being D'
    rounded up to a multiple of 8: byte [g, p, i] holds dimension 4 g + i of key p in its low and
    W / 2 + 4 g + i in its high four bits. code_scale: [B, Hkv, N, P] uint8, contiguous in P.
    page_scale: [B, Hkv, N] float32. counts: [B, Hkv, N] int32, tokens in each page. candidates:
    [B, Hkv, C] int64 pages in any order, none twice, -1 for nothing.
    Returns log_mass and shift, both [B, Hq, N] float32 and new; only candidates differ.
    """
    checks.expect_stored("mean", mean)
    shape = tuple(mean.shape)
    checks.expect_heads("query", query, shape[0], shape[1], shape[3])
    checks.expect_heads("log_mass", log_mass, shape[0], shape[1], shape[2])
    for name, part in (("log_mass", log_mass), ("code_query", code_query)):
        if part.dim() != 3 or part.shape[1] != query.shape[1]:
            raise ValueError(
                f"{name} must be of the Hq={query.shape[1]} heads of query, got {tuple(part.shape)}"
            )
    checks.expect_shift(shift, log_mass)
    page_size = code_scale.shape[-1]
    checks.expect_heads("code_query", code_query, shape[0], shape[1], code_query.shape[-1])
    packed = (*shape[:3], (code_query.shape[-1] + 7) // 8, page_size, 4)
    checks.expect("codes", codes, packed, torch.uint8, like=mean)
    checks.expect("code_scale", code_scale, (*shape[:3], page_size), torch.uint8, like=mean)
    checks.expect("page_scale", page_scale, shape[:3], torch.float32, like=mean)
    checks.expect_rows("code_scale", code_scale)
    checks.expect_inner("codes", codes, 3)
    checks.expect("counts", counts, shape[:3], torch.int32, like=mean)
    expected = (*shape[:2], candidates.shape[-1])
    checks.expect("candidates", candidates, expected, torch.int64, like=mean)
    checks.expect_softcap(softcap)
    pages = mean, codes, code_scale, page_scale, counts, candidates
    run = _backend(query, code_query, log_mass, shift, mean).refine
    refined: tuple[Tensor, Tensor] = run(
        query, code_query, log_mass, shift, *pages, scale=scale, softcap=softcap
    )
    return refined


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

    log_mass: [B, Hq, N] as from `score`. max_pages: the most pages per KV head. top_p in (0, 1]:
    take the fewest pages that hold this share of the rank, within min_pages and max_pages; None
    takes max_pages, and min_pages has no effect.
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


def estimate(
    log_mass: Tensor,
    value_mean: Tensor,
    selected: Tensor,
    shift: Tensor | None = None,
    slope: Tensor | None = None,
    *,
    span_pages: int = 1,
) -> State:
    """Estimate the attention over the pages that were not selected, from their statistics.

    A page stands for its tokens with its mean value, weighted by its estimated mass: the estimation
    zone of RetroInfer (VLDB 19(5), section 4.2). With shift and slope its value is the mean plus
    shift * slope: attention leans towards the keys of a page that fit the query, and their values
    differ from the mean as values go with keys.

    log_mass: [B, Hq, N] as from `score`. value_mean: [B, Hkv, N, D], a view with any strides (rows
    contiguous). selected: [B, Hkv, M] int64 page indices below N in any order, -1 for nothing.
    shift: [B, Hq, N] as from `score`. slope: [B, Hq, S, D] as from `value_slope`; page n belongs to
    span n // span_pages, and the S spans hold all pages. Without slope, shift is not read.
    Returns the state: out [B, Hq, D], lse [B, Hq], float32.
    """
    checks.expect_stored("value_mean", value_mean)
    shape = tuple(value_mean.shape)
    checks.expect_heads("log_mass", log_mass, *shape[:3])
    if slope is not None:
        if shift is None or span_pages < 1:
            raise ValueError(
                "a slope needs the shift of each page and span_pages >= 1, got span_pages="
                f"{span_pages} and {'no' if shift is None else 'a'} shift"
            )
        checks.expect_shift(shift, log_mass)
        spans = -(-shape[2] // span_pages)
        wanted = (shape[0], log_mass.shape[1], spans, shape[3])
        checks.expect("slope", slope, wanted, torch.float32, like=value_mean)
    if selected.dim() != 3:
        raise ValueError(f"selected must be [B, Hkv, M], got {tuple(selected.shape)}")
    expected = (*shape[:2], selected.shape[2])
    checks.expect("selected", selected, expected, torch.int64, like=value_mean)
    run = _backend(log_mass, value_mean, *([] if shift is None else [shift])).estimate
    state: State = run(log_mass, value_mean, selected, shift, slope, span_pages=span_pages)
    return state


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
