"""refine: numba against the torch reference, and what it is for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wavekv.index import encode_keys
from wavekv.kernels import refine, score, select, use_backend


def make_pages(
    seed: int, shape: tuple[int, ...], page_size: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Keys, their means, codes and counts; what lies beyond a count is NaN in the keys."""
    rng = torch.Generator().manual_seed(seed)
    batch, kv_heads, pages, width = shape
    counts = torch.randint(0, page_size + 1, shape[:3], generator=rng, dtype=torch.int32)
    live = torch.arange(page_size) < counts[..., None]
    keys = torch.randn(*shape[:3], page_size, width, generator=rng)
    total = torch.where(live[..., None], keys, 0).sum(3)
    mean = (total / counts.clamp(min=1)[..., None]).to(dtype)
    poisoned = keys.masked_fill(~live[..., None], torch.nan)
    rows = batch * kv_heads
    made = encode_keys(
        poisoned.reshape(rows, pages, page_size, width),
        mean.reshape(rows, pages, width),
        counts.reshape(rows, pages),
    )
    return {
        "keys": keys,
        "mean": mean,
        "codes": made.codes.reshape(*shape[:3], -1, page_size, 4),
        "code_scale": made.scale.reshape(*shape[:3], page_size),
        "page_scale": made.page_scale.reshape(shape[:3]),
        "counts": counts,
    }


@given(
    shape=st.tuples(
        st.integers(1, 2),
        st.integers(1, 3),
        st.sampled_from([1, 5, 33]),
        st.sampled_from([3, 8, 20, 64, 80]),
    ),
    group=st.integers(1, 4),
    page_size=st.sampled_from([1, 2, 3, 4, 8, 9, 16, 32]),
    num_candidates=st.integers(0, 7),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    softcap=st.sampled_from([None, 5.0]),
    seed=st.integers(0, 2**31),
)
def test_refine_equals_reference(
    shape, group, page_size, num_candidates, dtype, softcap, seed
) -> None:
    pages = make_pages(seed, shape, page_size, dtype)
    rng = torch.Generator().manual_seed(seed)
    batch, kv_heads, num_pages, width = shape
    query = torch.randn(batch, kv_heads * group, width, generator=rng)
    log_mass, shift = torch.randn(2, batch, kv_heads * group, num_pages, generator=rng)
    order = torch.rand(batch, kv_heads, num_pages, generator=rng).argsort(-1)
    candidates = order[..., :num_candidates].clone()
    candidates[..., num_candidates // 2 :] = -1
    names = ("mean", "codes", "code_scale", "page_scale", "counts")
    arguments = query, query, log_mass, shift, *(pages[name] for name in names), candidates
    results = []
    for backend in ("numba", "torch"):
        with use_backend(backend):
            results.append(refine(*arguments, scale=0.3, softcap=softcap))
    # where a component of the query lies halfway between two codes, either is right
    step = 0.3 * query.abs().amax() / 127 * pages["page_scale"].amax() * 7
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 + 2 * float(step))
        is_close = torch.isclose(got, want, rtol=1e-4, atol=1e-4)
        assert (~is_close).sum() <= 0.01 * got.numel() + 1
    is_candidate = torch.zeros(batch, kv_heads, num_pages + 1, dtype=torch.bool)
    is_candidate.scatter_(2, candidates.masked_fill(candidates < 0, num_pages), True)
    others = ~is_candidate[..., :num_pages].repeat_interleave(group, 1)
    for got, before in zip(results[0], (log_mass, shift), strict=True):
        assert torch.equal(got[others], before[others])


def test_refine_is_close_to_the_mass_of_the_exact_keys() -> None:
    pages = make_pages(0, (1, 2, 40, 64), 8, torch.float32)
    query = torch.randn(1, 4, 64)
    logits = torch.einsum("bhgd,bhnpd->bhgnp", query.reshape(1, 2, 2, 64), pages["keys"]) * 0.125
    live = (torch.arange(8) < pages["counts"][..., None])[:, :, None]
    truth = logits.masked_fill(~live, -torch.inf).logsumexp(-1).flatten(1, 2)
    weights = logits.masked_fill(~live, -torch.inf).softmax(-1).nan_to_num()
    plain = live / pages["counts"].clamp(min=1)[:, :, None, :, None]
    rise = ((weights - plain) * logits).sum(-1).flatten(1, 2)
    everything = torch.arange(40).expand(1, 2, 40).contiguous()
    names = ("mean", "codes", "code_scale", "page_scale", "counts")
    parts = [pages[name] for name in names]
    nothing = torch.zeros(2, 1, 4, 40)
    refined, shift = refine(query, query, *nothing, *parts, everything, scale=0.125)
    held = truth > -torch.inf
    assert torch.equal(refined > -torch.inf, held)
    assert (refined - truth)[held].abs().max() < 0.25
    assert (refined - truth)[held].square().mean().sqrt() < 0.06
    assert (shift - rise).abs().max() < 0.25
    assert (shift - rise).square().mean().sqrt() < 0.06
    assert rise.square().mean().sqrt() > 0.5


def test_refine_finds_a_key_that_its_page_hides() -> None:
    """One key fits the query among random ones: the mean shows little of it, the codes all."""
    found = {"means": 0, "codes": 0}
    for seed in range(20):
        pages = make_pages(seed, (1, 1, 512, 64), 16, torch.float32)
        counts = torch.full((1, 1, 512), 16, dtype=torch.int32)
        pages = {"keys": torch.randn(1, 1, 512, 16, 64), "counts": counts}
        query = pages["keys"][0, 0, 77, 3][None, None] * 1.0
        mean = pages["keys"].mean(3)
        variance = pages["keys"].var(3, unbiased=False).mean(-1)
        made = encode_keys(pages["keys"][0], mean[0], counts[0])
        log_mass, shift = score(query, mean, variance, counts, scale=0.25)
        found["means"] += 77 in select(log_mass, 1, max_pages=5)
        candidates = select(log_mass, 1, max_pages=256)
        parts = mean, made.codes[None], made.scale[None], made.page_scale[None], counts
        refined, _ = refine(query, query, log_mass, shift, *parts, candidates, scale=0.25)
        found["codes"] += 77 in select(refined, 1, max_pages=5)
    assert found["codes"] >= 18
    assert found["means"] < found["codes"]


@pytest.mark.parametrize(
    "name", ["codes", "code_scale", "page_scale", "counts", "candidates", "shift"]
)
def test_wrong_shapes_are_named(name: str) -> None:
    pages = make_pages(0, (1, 2, 4, 8), 4, torch.float32)
    pages["candidates"] = torch.zeros(1, 2, 1, dtype=torch.int64)
    log_mass, pages["shift"] = torch.zeros(2, 1, 4, 4)
    pages[name] = pages[name][:, :1]
    names = ("shift", "mean", "codes", "code_scale", "page_scale", "counts", "candidates")
    arguments = [pages[key] for key in names]
    with pytest.raises(ValueError, match=f"{name} must be"):
        refine(*torch.randn(2, 1, 4, 8), log_mass, *arguments, scale=1.0)


def test_codes_in_another_order_are_refused() -> None:
    pages = make_pages(0, (1, 2, 4, 16), 4, torch.float32)
    pages["codes"] = pages["codes"].mT.contiguous().mT
    arguments = [pages[key] for key in ("mean", "codes", "code_scale", "page_scale", "counts")]
    candidates = torch.zeros(1, 2, 1, dtype=torch.int64)
    queries, pages_like = torch.randn(2, 1, 4, 16), torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match="codes must have 3 contiguous last dimensions"):
        refine(*queries, *pages_like, *arguments, candidates, scale=1.0)


def test_masses_of_other_heads_are_named() -> None:
    pages = make_pages(0, (1, 2, 4, 8), 4, torch.float32)
    arguments = [pages[key] for key in ("mean", "codes", "code_scale", "page_scale", "counts")]
    candidates = torch.zeros(1, 2, 1, dtype=torch.int64)
    queries, pages_like = torch.randn(2, 1, 4, 8), torch.zeros(2, 1, 2, 4)
    with pytest.raises(ValueError, match="Hq=4 heads of query, got"):
        refine(*queries, *pages_like, *arguments, candidates, scale=1.0)
