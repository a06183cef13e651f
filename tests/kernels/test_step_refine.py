"""Codes of candidates in a decode step: against the reference, and against sums by hand."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import implementation
from step_cases import Case, make_case
from torch import Tensor

from wavekv.kernels import step_reference
from wavekv.kernels.levels import refine_levels, score_levels
from wavekv.kernels.mixing import mixing
from wavekv.kernels.page_index import PageIndex
from wavekv.kernels.step import CANDIDATES, ESTIMATED, FINALISTS, FIRST, REFINED, SECOND

pytestmark = pytest.mark.usefixtures("_one_thread")


class Refined(NamedTuple):
    """Log mass [B, Hq, n] before and after the codes were read, which pages were candidates [B,
    Hkv, n], and the shift of these."""

    before: Tensor
    after: Tensor
    shift: Tensor
    is_candidate: Tensor


def refined(ops: ModuleType, case: Case) -> list[Refined]:
    """Score, then rank and refine twice."""
    c, n = case, int(case.counters[2])
    scratch = c.scratch
    ops.score(c.query, None, None, None, c.steady, c.pages, c.counters, scratch, c.shape)
    stages = []
    for stage in FIRST, SECOND:
        before = scratch.log_mass[..., :n].clone()
        ops.rank_pages(c.pages, c.counters, c.limits, scratch, c.shape, stage=stage)
        is_candidate = scratch.rank[..., :n] >= scratch.threshold[stage].unsqueeze(-1)
        ops.refine(c.pages, c.counters, scratch, c.shape, stage=stage)
        after, shift = (x[..., :n].clone() for x in (scratch.log_mass, scratch.shift))
        stages.append(Refined(before, after, shift, is_candidate))
    return stages


def plane_of(plane: np.ndarray, bits: int, p: int, d: int) -> int:
    """Dimension d of key p."""
    per_word = 32 // bits
    byte = int(plane[d // per_word, p, d % 4])
    return byte >> (bits * (d % per_word // 4)) & (2**bits - 1)


def of_codes(case: Case, b: int, h: int, page: int, stage: int) -> tuple[np.ndarray, np.ndarray]:
    """Log mass and shift [G] of a page from the codes of its keys, in float64 and one by one."""
    shape, G, D = case.shape, case.shape.group, case.shape.head_dim
    summary = PageIndex._make(part[b, h].cpu() for part in case.pages.summary)
    count = int(summary.counts[page])
    high, low = summary.high[page].numpy(), summary.low[page].numpy()
    block = page // shape.block_pages
    mean = summary.block_mean[block].double() * summary.block_mean_scale[block].double()
    codes = summary.mean[block].numpy()
    step = 2 ** ((float(summary.mean_step[page]) - 160) / 8)
    residual = np.array([plane_of(codes, 2, page % shape.block_pages, d) - 1.5 for d in range(D)])
    mix = mixing(D).numpy()
    masses, shifts = np.zeros(G), np.zeros(G)
    for g in range(G):
        query = case.query[b, h * G + g].cpu().double().numpy() * shape.scale
        mixed = query @ mix
        worth = np.abs(mixed).max() / 127
        mixed = np.round(mixed / worth) * worth
        offsets = []
        for p in range(count):
            offset = 0.0
            for d in range(D):
                code = 2 * plane_of(high, 2, p, d)
                code = code - 3 if stage == FIRST else code + plane_of(low, 1, p, d) - 3.5
                offset += mixed[d] * code
            offsets.append(offset * 2 ** ((float(summary.key_step[page, p]) - 160) / 8))
        logits = np.array(offsets) + query @ mean.numpy() + mixed @ residual * step
        if shape.softcap is not None:
            logits = shape.softcap * np.tanh(logits / shape.softcap)
        masses[g] = np.logaddexp.reduce(logits)
        shifts[g] = (np.exp(logits - masses[g]) * (offsets - np.mean(offsets))).sum()
    return masses, shifts


def code_case(device: str, seed: int, num_pages: int, spare: int, **chosen: Any) -> Case:
    """Pages of all sizes, and a mixed query no component of which is rounded by chance."""
    case = make_case(
        seed,
        num_pages=num_pages,
        capacity=num_pages + spare,
        most=3,
        least=1,
        slots=3,
        misses=3,
        sinks=0,
        ring=8,
        device=device,
        **chosen,
    )
    random = torch.Generator().manual_seed(1)
    steps = torch.randint(-126, 127, case.query.shape, generator=random).double()
    steps += 0.8 * torch.rand(case.query.shape, generator=random) - 0.4
    steps[..., 3] = 127
    case.query.copy_(steps / 60 @ mixing(case.shape.head_dim).T)
    return case


def check_refined(ops: ModuleType, case: Case, by_hand: int) -> None:
    c, n, G = case, int(case.counters[2]), case.shape.group
    stages = refined(ops, case)
    summary = c.pages.summary.in_pages(0, n)
    scores = score_levels(
        c.query,
        summary,
        scale=c.shape.scale,
        softcap=c.shape.softcap,
        use_variance=c.shape.tail == "second",
    )
    torch.testing.assert_close(stages[0].before, scores.log_mass, rtol=1e-4, atol=1e-4)
    is_empty = summary.counts <= 0
    status = torch.full_like(summary.counts, ESTIMATED)
    for stage, found in zip((FIRST, SECOND), stages, strict=True):
        is_candidate = found.is_candidate
        # as a list of pages, -1 for the rest
        ids = torch.arange(n, device=status.device).expand_as(is_candidate)
        candidates = ids.masked_fill(~is_candidate, -1).sort(dim=-1, descending=True).values
        scores = scores._replace(log_mass=found.before)
        scores = refine_levels(
            scores, summary, candidates, use_low=stage == SECOND, softcap=c.shape.softcap
        )
        torch.testing.assert_close(found.after, scores.log_mass, rtol=1e-4, atol=1e-4)
        of_heads = is_candidate.repeat_interleave(G, 1)
        assert torch.equal(found.after[~of_heads], found.before[~of_heads])
        torch.testing.assert_close(
            found.shift[of_heads], scores.shift[of_heads], rtol=1e-4, atol=1e-4
        )
        status[is_candidate] = REFINED
        assert not (is_candidate & is_empty).any()
        assert (found.after[is_empty.repeat_interleave(G, 1)] == -torch.inf).all()
        limit = int(c.limits[(CANDIDATES, FINALISTS)[stage]])
        if int(c.limits[CANDIDATES]) and n > c.shape.most:
            wanted = (~is_empty).sum(-1).clamp(max=limit)
            assert (is_candidate.sum(-1) >= wanted).all()
        else:
            assert not is_candidate.any()
        for b, h, page in is_candidate.nonzero().tolist()[:by_hand]:
            heads = slice(h * G, (h + 1) * G)
            own = (x[b, heads, page].cpu().double().numpy() for x in (found.after, found.shift))
            for ours, theirs in zip(own, of_codes(c, b, h, page, stage), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(c.scratch.status[..., :n], status)


def code_cases(sizes: st.SearchStrategy[int]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**20),
            "num_pages": sizes,
            "spare": st.sampled_from([0, 1, 9]),
            "batch": st.integers(1, 2),
            "kv_heads": st.integers(1, 2),
            "group": st.integers(1, 7),
            "head_dim": st.sampled_from([8, 24, 80, 128]),
            "page_size": st.sampled_from([1, 2, 4, 8, 16]),
            "candidates": st.sampled_from([0, 1, 5, 40]),
            "finalists": st.sampled_from([1, 4]),
            "block_pages": st.sampled_from([1, 2, 16]),
            "softcap": st.sampled_from([None, 5.0]),
            "tail": st.sampled_from(["first", "second"]),
            "spread": st.sampled_from([0.1, 1.0, 4.0]),
        }
    )


@settings(max_examples=60)
@given(chosen=code_cases(st.integers(1, 40)))
def test_twin_refines_as_the_reference(chosen: dict[str, Any]) -> None:
    check_refined(step_reference, code_case("cpu", **chosen), by_hand=2)


@settings(max_examples=6)
@given(chosen=code_cases(st.sampled_from([1, 20, 66])))
def test_kernels_refine_as_the_reference(chosen: dict[str, Any]) -> None:
    ops, device = implementation("triton")
    check_refined(ops, code_case(device, **chosen), by_hand=1)


@pytest.mark.parametrize(
    ("group", "head_dim", "page_size"),
    [(1, 128, 16), (2, 24, 2), (3, 8, 1), (4, 80, 4), (5, 8, 8), (6, 24, 16), (7, 80, 1)],
)
def test_kernels_refine_every_head_of_a_group(group: int, head_dim: int, page_size: int) -> None:
    ops, device = implementation("triton")
    case = code_case(
        device,
        group,
        50,
        3,
        group=group,
        head_dim=head_dim,
        page_size=page_size,
        candidates=20,
        finalists=5,
    )
    check_refined(ops, case, by_hand=3)
