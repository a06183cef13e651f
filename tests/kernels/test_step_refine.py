"""Codes of candidates in a decode step: against the reference, and against sums by hand."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import implementation
from step_cases import Case, make_case
from torch import Tensor

from wavekv.kernels import reference, step_reference
from wavekv.kernels.means import unpack_rows
from wavekv.kernels.step import CANDIDATES

pytestmark = pytest.mark.usefixtures("_one_thread")


def refined(ops: ModuleType, case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Score, rank and refine. Returns log mass and shift by moments and after codes [B, Hq, n], and
    which pages are candidates [B, Hkv, n]."""
    c, n = case, int(case.counters[2])
    ops.score(c.query, None, None, None, c.steady, c.pages, c.counters, c.scratch, c.shape)
    log_mass, shift = (x[..., :n].clone() for x in (c.scratch.log_mass, c.scratch.shift))
    ops.rank_pages(c.counters, c.limits, c.scratch, c.shape, is_final=False)
    is_candidate = c.scratch.rank[..., :n] >= c.scratch.threshold[0].unsqueeze(-1)
    ops.refine(c.query, c.pages, c.counters, c.scratch, c.shape)
    return log_mass, shift, c.scratch.log_mass[..., :n], c.scratch.shift[..., :n], is_candidate


def of_codes(case: Case, b: int, h: int, page: int) -> tuple[np.ndarray, np.ndarray]:
    """Log mass and shift [G] of a page from the codes of its keys, in float64 and one by one."""
    shape, G = case.shape, case.shape.group
    count = int(case.pages.counts[b, h, page])
    codes = case.pages.codes[b, h, page].cpu().numpy()
    half = 4 * codes.shape[0]
    scale = float(case.pages.mean_scale[b, h, page])
    mean = scale * case.pages.mean[b, h, page].cpu().double().numpy()
    page_scale = float(case.pages.page_scale[b, h, page])
    masses, shifts = np.zeros(G), np.zeros(G)
    for g in range(G):
        query = case.query[b, h * G + g].cpu().double().numpy() * shape.scale
        step = np.abs(query).max() / 127
        rounded = np.round(query / step) * step
        offsets = []
        for p in range(count):
            offset = 0.0
            for d in range(shape.head_dim):
                byte = int(codes[(d % half) // 4, p, d % 4])
                nibble = byte & 15 if d < half else byte >> 4
                offset += rounded[d] * (nibble - 8)
            offsets.append(offset * page_scale * int(case.pages.code_scale[b, h, page, p]) / 255)
        offset = np.array(offsets) - np.mean(offsets)
        logits = offset + query @ mean
        if shape.softcap is not None:
            logits = shape.softcap * np.tanh(logits / shape.softcap)
        masses[g] = np.logaddexp.reduce(logits)
        shifts[g] = (np.exp(logits - masses[g]) * offset).sum()
    return masses, shifts


def code_case(device: str, seed: int, num_pages: int, spare: int, **chosen: Any) -> Case:
    """Pages of all sizes, and a query no component of which is rounded by chance."""
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
    steps = torch.randint(-126, 127, case.query.shape, generator=random).float()
    steps += 0.8 * torch.rand(case.query.shape, generator=random) - 0.4
    steps[..., 3] = 127
    case.query.copy_(steps / 60)
    return case


def check_refined(ops: ModuleType, case: Case, by_hand: int) -> None:
    c, n = case, int(case.counters[2])
    log_mass, shift, mass, lean, is_candidate = refined(ops, case)
    variance = c.pages.variance[:, :, :n] if c.shape.tail == "second" else None
    mean = unpack_rows(c.pages.mean, c.pages.mean_scale, c.shape.head_dim, torch.float32)
    moments = reference.score(
        c.query,
        mean[:, :, :n],
        variance,
        c.pages.counts[:, :, :n],
        scale=c.shape.scale,
        softcap=c.shape.softcap,
    )
    for ours, theirs in zip((log_mass, shift), moments, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    # as a list of pages, -1 for the rest
    ids = torch.arange(n, device=mass.device).expand_as(is_candidate)
    candidates = ids.masked_fill(~is_candidate, -1).sort(dim=-1, descending=True).values
    expected = reference.refine(
        c.query,
        c.query,
        log_mass,
        shift,
        mean[:, :, :n],
        c.pages.codes[:, :, :n],
        c.pages.code_scale[:, :, :n],
        c.pages.page_scale[:, :, :n],
        c.pages.counts[:, :, :n],
        candidates,
        scale=c.shape.scale,
        softcap=c.shape.softcap,
    )
    for ours, theirs in zip((mass, lean), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    others = ~is_candidate.repeat_interleave(c.shape.group, 1)
    for ours, before in zip((mass, lean), (log_mass, shift), strict=True):
        assert torch.equal(ours[others], before[others])
    is_empty = c.pages.counts[:, :, :n] <= 0
    assert not (is_candidate & is_empty).any()
    assert (mass[is_empty.repeat_interleave(c.shape.group, 1)] == -torch.inf).all()
    if int(c.limits[CANDIDATES]) and n > c.shape.most:
        wanted = (~is_empty).sum(-1).clamp(max=int(c.limits[CANDIDATES]))
        assert (is_candidate.sum(-1) >= wanted).all()
    else:
        assert not is_candidate.any()
    G = c.shape.group
    for b, h, page in is_candidate.nonzero().tolist()[:by_hand]:
        found = (x[b, h * G : (h + 1) * G, page].cpu().double().numpy() for x in (mass, lean))
        for ours, theirs in zip(found, of_codes(c, b, h, page), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


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
        device, group, 50, 3, group=group, head_dim=head_dim, page_size=page_size, candidates=20
    )
    check_refined(ops, case, by_hand=3)
