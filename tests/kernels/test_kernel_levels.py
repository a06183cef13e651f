"""Kernels over an index of two levels: against what it stands for, and numba against torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wavekv.index.levels import index_of_pages
from wavekv.kernels import use_backend, value_slope
from wavekv.kernels.levels import Scores, estimate_levels, refine_levels, score_levels
from wavekv.kernels.mixing import mixing
from wavekv.kernels.page_index import (
    HIGH_BITS,
    LOW_BITS,
    PageIndex,
    block_values,
    mean_keys,
    mean_values,
)
from wavekv.kernels.planes import centred, steps_of, unpack_plane
from wavekv.kernels.reference import by_group, by_moments

pytestmark = pytest.mark.usefixtures("_one_thread")

BACKENDS = ["torch", "numba"]
CASES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**20),
        "batch": st.integers(1, 2),
        "kv_heads": st.integers(1, 2),
        "group": st.sampled_from([1, 3, 4]),
        "head_dim": st.sampled_from([1, 2, 8, 13, 48, 64, 80, 96, 128]),
        "page_size": st.sampled_from([1, 2, 3, 4, 8, 16, 32]),
        "block_pages": st.sampled_from([1, 2, 4, 16]),
        "blocks": st.sampled_from([0, 1, 3, 40]),
        "softcap": st.sampled_from([None, 4.0]),
    }
)


class Case(NamedTuple):
    query: Tensor
    index: PageIndex
    softcap: float | None
    keys: Tensor
    """[B, Hkv, N, P, D] of all tokens, as the codes have them."""
    scatter: Tensor
    random: torch.Generator


def make_case(
    seed: int,
    *,
    batch: int = 1,
    kv_heads: int = 2,
    group: int = 4,
    head_dim: int = 64,
    page_size: int = 8,
    block_pages: int = 16,
    blocks: int = 5,
    softcap: float | None = None,
) -> Case:
    """Pages of which some are short or empty, in buffers with room behind, and queries that are not
    rounded when they are mixed."""
    random = torch.Generator().manual_seed(seed)
    N, R, D = blocks * block_pages, batch * kv_heads, head_dim
    keys, values = torch.randn(2, R, N, page_size, D, generator=random)
    keys += 2 * torch.randn(R, N, 1, D, generator=random)
    odd = torch.rand(R, N, generator=random)
    counts = torch.full((R, N), page_size, dtype=torch.int32)
    counts[odd < 0.2], counts[odd < 0.1] = 1, 0
    made = index_of_pages(keys, values, counts, block_pages)
    index = PageIndex._make(_with_room(part.unflatten(0, (batch, kv_heads))) for part in made)
    steps = torch.randint(-126, 127, (batch, kv_heads * group, D), generator=random).double()
    steps[..., 0] = 127
    query = (steps / 60 @ mixing(D).T).float()
    codes = (unpack_plane(made.high, HIGH_BITS, D) << LOW_BITS) | unpack_plane(made.low, 1, D)
    residual = centred(codes, HIGH_BITS + LOW_BITS) * steps_of(made.key_step).unsqueeze(-1)
    stored = mean_keys(made).unsqueeze(2) + residual @ mixing(D).float().T
    scatter = torch.randn(batch, kv_heads, 2, 2, D, D, generator=random)
    scatter[:, :, :, 0] = scatter[:, :, :, 0] @ scatter[:, :, :, 0].mT
    shape = batch, kv_heads, N, page_size, D
    return Case(query, index, softcap, stored.view(shape), scatter.bfloat16(), random)


def _with_room(part: Tensor) -> Tensor:
    """The same in a buffer with two more entries of each head, as an index that grows has it."""
    B, H, N = part.shape[:3]
    buffer = part.new_full((B, H, N + 2, *part.shape[3:]), 77)
    buffer[:, :, :N] = part
    return buffer[:, :, :N]


def scored(case: Case, backend: Any, use_variance: bool = True) -> Scores:
    scale = case.query.shape[-1] ** -0.5
    with use_backend(backend):
        return score_levels(
            case.query,
            case.index,
            scale=scale,
            softcap=case.softcap,
            use_variance=use_variance,
        )


def some_pages(case: Case, share: float) -> Tensor:
    """[B, Hkv, C] pages in any order, with -1 between them."""
    counts = case.index.counts
    order = torch.rand(counts.shape, generator=case.random).argsort(-1)
    pages = order[..., : round(share * counts.shape[2])]
    drop = torch.rand(pages.shape, generator=case.random) < 0.2
    return pages.masked_fill(drop, -1)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 2e-4) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60)
@given(chosen=CASES, use_variance=st.booleans())
def test_scores_are_those_of_the_stored_means(
    backend: str, chosen: dict[str, Any], use_variance: bool
) -> None:
    case = make_case(**chosen)
    scores = scored(case, backend, use_variance)
    q = by_group(case.query, case.index.counts.shape[1]) * case.query.shape[-1] ** -0.5
    log_mass, shift = by_moments(
        q @ mean_keys(case.index).mT,
        q.square().sum(-1),
        steps_of(case.index.variance) if use_variance else None,
        case.index.counts.int(),
        case.softcap,
    )
    close(scores.log_mass, log_mass)
    close(scores.shift, shift)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use_low", [False, True])
@settings(max_examples=40)
@given(chosen=CASES)
def test_refined_pages_have_the_mass_of_their_codes(
    backend: Any, use_low: bool, chosen: dict[str, Any]
) -> None:
    case = make_case(**chosen)
    scores = scored(case, backend)
    pages = some_pages(case, 0.5)
    with use_backend(backend):
        found = refine_levels(scores, case.index, pages, use_low=use_low, softcap=case.softcap)
    B, Hkv, N = case.index.counts.shape
    taken = torch.zeros(B, Hkv, N + 1, dtype=torch.bool)
    taken = taken.scatter_(2, pages.masked_fill(pages < 0, N), True)[..., :-1]
    group = case.query.shape[1] // Hkv
    others = ~taken.repeat_interleave(group, 1)
    assert torch.equal(found.log_mass[others], scores.log_mass[others])
    assert torch.equal(found.shift[others], scores.shift[others])
    if not use_low:
        return
    q = case.query.unflatten(1, (Hkv, group)) * case.query.shape[-1] ** -0.5
    plain = torch.einsum("bhgd,bhnpd->bhgnp", q, case.keys)
    count = case.index.counts.unsqueeze(2).unsqueeze(-1)
    held = torch.arange(plain.shape[-1]) < count
    logits = plain if case.softcap is None else case.softcap * (plain / case.softcap).tanh()
    logits = logits.masked_fill(~held, -torch.inf)
    mean = plain.masked_fill(~held, 0.0).sum(-1, keepdim=True) / count.clamp(min=1)
    lean = (logits.softmax(-1) * (plain - mean)).masked_fill(~held, 0.0).sum(-1)
    close(found.log_mass[~others], logits.logsumexp(-1).flatten(1, 2)[~others])
    close(found.shift[~others], lean.flatten(1, 2)[~others])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60)
@given(chosen=CASES, use_slope=st.booleans())
def test_estimates_have_the_values_of_pages_or_blocks(
    backend: Any, chosen: dict[str, Any], use_slope: bool
) -> None:
    case = make_case(**chosen)
    scores = scored(case, "torch")
    selected, refined = some_pages(case, 0.2), some_pages(case, 0.4)
    B, Hkv, N = case.index.counts.shape
    span = max(1, -(-N // 2 // chosen["block_pages"])) * chosen["block_pages"]
    scatter = case.scatter[:, :, : -(-N // span)]
    slope = value_slope(case.query, scatter, scale=0.3) if use_slope and N else None
    is_own = torch.zeros(B, Hkv, N + 1, dtype=torch.bool)
    is_own = is_own.scatter_(2, refined.masked_fill(refined < 0, N), True)[..., :-1]
    own = block_values(case.index).repeat_interleave(chosen["block_pages"], 2)
    values = torch.where(is_own.unsqueeze(-1), mean_values(case.index), own)
    with use_backend(backend):
        out, lse = estimate_levels(
            scores.log_mass, case.index, selected, refined, scores.shift, slope, span_pages=span
        )
    is_left = torch.ones(B, Hkv, N + 1, dtype=torch.bool)
    is_left = is_left.scatter_(2, selected.masked_fill(selected < 0, N), False)[..., :-1]
    group = case.query.shape[1] // Hkv
    masses = scores.log_mass.masked_fill(~is_left.repeat_interleave(group, 1), -torch.inf)
    close(lse, masses.logsumexp(-1), 1e-3)
    weights = masses.softmax(-1).nan_to_num(nan=0.0)
    rows = values.repeat_interleave(group, 1)
    if slope is not None:
        own_slope = slope.repeat_interleave(span, 2)[:, :, :N]
        rows = rows + scores.shift.unsqueeze(-1) * own_slope
    close(out, torch.einsum("bhn,bhnd->bhd", weights, rows), 1e-3)


def test_a_wrong_part_is_named() -> None:
    case = make_case(0)
    scores, none = scored(case, "auto"), torch.zeros(1, 2, 0, dtype=torch.int64)
    broken = case.index._replace(high=case.index.high[..., :3])
    with pytest.raises(ValueError, match=r"high must be \(1, 2, 80, 4, 8, 4\)"):
        scored(case._replace(index=broken), "auto")
    with pytest.raises(ValueError, match="candidates must be"):
        refine_levels(scores, case.index, none.float(), use_low=True)
    masses, slope = scores.log_mass, torch.zeros(1, 8, 3, 64)
    for shift, span in ((None, 32), (masses, 8)):
        with pytest.raises(ValueError, match=r"a slope needs the shift .* multiple of 16, got"):
            estimate_levels(masses, case.index, none, none, shift, slope, span_pages=span)
    with pytest.raises(ValueError, match=r"slope must be \(1, 8, 2, 64\)"):
        estimate_levels(masses, case.index, none, none, masses, slope, span_pages=48)
    for wrong in (masses[..., :5], masses[:, :2], masses.int()):
        with pytest.raises(ValueError, match="shift must be"):
            estimate_levels(masses, case.index, none, none, wrong, slope, span_pages=32)
    with pytest.raises(ValueError, match=r"selected must be \(1, 2, 0\)"):
        estimate_levels(masses, case.index, none.int(), none)
