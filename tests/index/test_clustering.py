"""balanced_pages: a permutation, padding last, rows apart, pages tighter than their rivals."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wavekv.index import balanced_pages

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_keys(seed: int, R: int, S: int, D: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(R, S, D, generator=generator)


def clustered_keys(seed: int, R: int, S: int, D: int, num_topics: int, noise: float) -> Tensor:
    """Tokens of `num_topics` Gaussian topics of equal spread, shuffled along the segment."""
    generator = torch.Generator().manual_seed(seed)
    topics = torch.randn(R, num_topics, D, generator=generator)
    topic = torch.randint(num_topics, (R, S, 1), generator=generator).expand(R, S, D)
    return topics.gather(1, topic) + noise * torch.randn(R, S, D, generator=generator)


def spread(keys: Tensor, order: Tensor, page_size: int) -> float:
    """Mean squared distance of a key to the mean of its page."""
    R, _, D = keys.shape
    pages = keys.gather(1, order.unsqueeze(-1).expand(-1, -1, D)).view(R, -1, page_size, D)
    return (pages - pages.mean(2, keepdim=True)).square().sum(-1).mean().item()


def page_sets(order: Tensor, page_size: int) -> set[frozenset[int]]:
    return {frozenset(page) for page in order.view(-1, page_size).tolist()}


def assert_permutation(order: Tensor, R: int, S: int) -> None:
    assert order.dtype == torch.int64
    assert order.shape == (R, S)
    assert order.is_contiguous()
    assert torch.equal(order.sort(1).values, torch.arange(S).expand(R, S))


@given(
    R=st.integers(1, 4),
    k=st.integers(0, 5),
    P=st.sampled_from((1, 2, 3, 5, 8, 16)),
    D=st.integers(1, 33),
    dtype=st.sampled_from(DTYPES),
    refine=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_order_is_a_permutation_and_repeats(
    R: int, k: int, P: int, D: int, dtype: torch.dtype, refine: bool, seed: int
) -> None:
    S = P << k
    keys = random_keys(seed, R, S, D).to(dtype)
    before = keys.clone()
    order = balanced_pages(keys, P, refine=refine)
    assert_permutation(order, R, S)
    assert torch.equal(order, balanced_pages(keys, P, refine=refine))
    assert torch.equal(keys, before)


@given(
    num_valid=st.lists(st.integers(0, 64), min_size=1, max_size=4),
    P=st.sampled_from((1, 4, 8, 16, 64)),
    poison=st.sampled_from((float("nan"), float("inf"), 6e4)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_padding_comes_last_and_has_no_influence(
    num_valid: list[int], P: int, poison: float, dtype: torch.dtype, seed: int
) -> None:
    R, S, D = len(num_valid), 64, 8
    keys = random_keys(seed, R, S, D).to(dtype)
    v = torch.tensor(num_valid).unsqueeze(1)
    scattered = random_keys(seed + 1, R, S, 1).squeeze(2).argsort(1)
    valid = torch.zeros(R, S, dtype=torch.bool).scatter_(1, scattered, torch.arange(S) < v)

    poisoned = keys.masked_fill(~valid.unsqueeze(-1), poison)
    order = balanced_pages(poisoned, P, valid)
    assert_permutation(order, R, S)
    page_valid = valid.gather(1, order).view(R, S // P, P)
    counts = (v - P * torch.arange(S // P)).clamp(0, P)
    assert torch.equal(page_valid, torch.arange(P) < counts.unsqueeze(-1))

    other = balanced_pages(keys.masked_fill(~valid.unsqueeze(-1), 0), P, valid)
    assert torch.equal(
        order.masked_fill(~valid.gather(1, order), -1),
        other.masked_fill(~valid.gather(1, other), -1),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_valid_equals_no_mask(dtype: torch.dtype) -> None:
    keys = random_keys(0, 2, 512, 16).to(dtype)
    everything = torch.ones(2, 512, dtype=torch.bool)
    assert torch.equal(balanced_pages(keys, 8, everything), balanced_pages(keys, 8))


@given(R=st.integers(2, 5), k=st.integers(0, 6), masked=st.booleans(), seed=st.integers(0, 2**16))
def test_rows_do_not_influence_each_other(R: int, k: int, masked: bool, seed: int) -> None:
    S = 8 << k
    keys = random_keys(seed, R, S, 12)
    valid = random_keys(seed + 1, R, S, 1).squeeze(2) > -1 if masked else None
    batched = balanced_pages(keys, 8, valid)
    for r in range(R):
        alone = balanced_pages(keys[r : r + 1], 8, None if valid is None else valid[r : r + 1])
        assert torch.equal(batched[r : r + 1], alone)


def test_a_long_row_alone_is_ordered_as_in_a_batch() -> None:
    keys = random_keys(0, 3, 4096, 64)
    assert torch.equal(balanced_pages(keys, 16)[1:2], balanced_pages(keys[1:2], 16))


def test_a_poisoned_row_leaves_the_others_alone() -> None:
    keys = random_keys(0, 3, 64, 8)
    clean = balanced_pages(keys, 8)
    keys[1] = float("nan")
    order = balanced_pages(keys, 8)
    assert_permutation(order, 3, 64)
    assert torch.equal(order[[0, 2]], clean[[0, 2]])


def test_padding_stays_last_after_a_valid_key_that_is_not_finite() -> None:
    keys = random_keys(0, 1, 64, 8)
    keys[0, 5] = float("nan")
    valid = (torch.arange(64) < 40).unsqueeze(0)
    order = balanced_pages(keys, 8, valid)
    assert torch.equal(valid.gather(1, order), valid)


@pytest.mark.parametrize("num_valid", [600, 904])
def test_padding_does_not_pull_the_directions_of_keys_far_from_zero(num_valid: int) -> None:
    S, P = 1024, 8
    keys = clustered_keys(1, 1, S, 16, num_topics=40, noise=0.1)
    valid = (torch.arange(S) < num_valid).unsqueeze(0)
    near = spread(keys, balanced_pages(keys, P, valid)[:, :num_valid], P)
    far = spread(keys, balanced_pages(keys + 2.0**18, P, valid)[:, :num_valid], P)
    assert far < 1.1 * near
    assert near < 0.25 * spread(keys, torch.arange(num_valid).unsqueeze(0), P)


@given(
    value=st.sampled_from((0.0, 1.0, -3e4, 1e-30)),
    dtype=st.sampled_from(DTYPES),
    k=st.integers(0, 4),
)
def test_constant_keys(value: float, dtype: torch.dtype, k: int) -> None:
    keys = torch.full((2, 8 << k, 16), value, dtype=dtype)
    assert_permutation(balanced_pages(keys, 8), 2, 8 << k)


def test_zero_variance_keeps_the_order() -> None:
    assert torch.equal(balanced_pages(torch.zeros(2, 64, 4), 8), torch.arange(64).expand(2, 64))


@pytest.mark.parametrize("pattern", ["alternating", "repeated", "mirrored", "runs"])
def test_duplicates_share_pages_whatever_their_pattern(pattern: str) -> None:
    """Eight distinct keys, eight times each: halves that are equal must not stop the bisection."""
    distinct = torch.arange(8)
    which = {
        "alternating": distinct.repeat(8),
        "repeated": distinct.repeat_interleave(2).repeat(4),
        "mirrored": torch.cat([distinct, distinct.flip(0)]).repeat(4),
        "runs": distinct.repeat_interleave(8),
    }[pattern]
    # corners of a box: sums of their coordinates cancel exactly, with no rounding to help
    corners = torch.tensor([[x, y, z] for x in (-4.0, 4.0) for y in (-2.0, 2.0) for z in (-1.0, 1)])
    keys = corners[which].unsqueeze(0)
    assert spread(keys, balanced_pages(keys, 8), 8) < 1e-8


def test_one_page_puts_valid_tokens_first_in_order() -> None:
    valid = torch.tensor([[False, True, False, True]])
    assert balanced_pages(torch.ones(1, 4, 2), 4, valid).tolist() == [[1, 3, 0, 2]]


def test_no_rows() -> None:
    assert balanced_pages(torch.empty(0, 32, 4), 8).shape == (0, 32)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_does_not_matter(scale: float) -> None:
    keys = clustered_keys(0, 1, 512, 16, num_topics=16, noise=0.1)
    assert spread(keys, balanced_pages(keys * scale, 8), 8) < 1.1 * spread(
        keys, balanced_pages(keys, 8), 8
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared_mean", [0.0, 30.0])
def test_pages_are_tighter_than_consecutive_and_random_ones(
    dtype: torch.dtype, shared_mean: float
) -> None:
    R, S, D, P = 2, 2048, 32, 16
    keys = (clustered_keys(1, R, S, D, num_topics=40, noise=0.15) + shared_mean).to(dtype)
    consecutive = torch.arange(S).expand(R, S)
    random = random_keys(2, R, S, 1).squeeze(2).argsort(1)
    ours = spread(keys.float(), balanced_pages(keys, P), P)
    assert ours < 0.25 * spread(keys.float(), consecutive, P)
    assert ours < 0.25 * spread(keys.float(), random, P)


def test_refinement_makes_pages_tighter() -> None:
    keys = clustered_keys(4, 2, 4096, 64, num_topics=100, noise=0.5)
    plain = spread(keys, balanced_pages(keys, 16), 16)
    assert spread(keys, balanced_pages(keys, 16, refine=True), 16) < 0.97 * plain


def test_same_pages_for_a_shuffled_segment() -> None:
    """Well separated keys: the pages are the same sets, in whatever order the tokens come."""
    P, num_pages = 8, 32
    centres = 50 * random_keys(5, 1, num_pages, 16)
    keys = centres.repeat_interleave(P, 1) + 0.01 * random_keys(6, 1, P * num_pages, 16)
    expected = page_sets(balanced_pages(keys, P), P)
    for seed in range(5):
        shuffle = torch.randperm(P * num_pages, generator=torch.Generator().manual_seed(seed))
        order = balanced_pages(keys[:, shuffle], P)
        assert page_sets(shuffle[order], P) == expected


def test_nothing_waits_for_the_device() -> None:
    """Meta tensors hold no data: reading any back (`item`, boolean indexing, `nonzero`) raises."""
    keys = torch.empty(2, 1024, 16, device="meta")
    valid = torch.empty(2, 1024, dtype=torch.bool, device="meta")
    assert balanced_pages(keys, 16, valid).device.type == "meta"
    assert balanced_pages(keys.bfloat16(), 16).shape == (2, 1024)


@pytest.mark.gpu
def test_nothing_waits_for_a_real_device() -> None:
    keys = clustered_keys(7, 3, 8192, 64, num_topics=100, noise=0.3)
    valid = (torch.arange(8192) < torch.tensor([[8192], [5000], [3]])).expand(3, -1)
    on_device, valid_on_device = keys.cuda(), valid.cuda()
    with warnings.catch_warnings():
        # torch warns that the mode is a prototype, after it has set it
        warnings.simplefilter("ignore", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        order = balanced_pages(on_device, 16, valid_on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_permutation(order.cpu(), 3, 8192)
    ours, cpu = (spread(keys[:1], o[:1].cpu(), 16) for o in (order, balanced_pages(keys, 16)))
    assert ours == pytest.approx(cpu, rel=0.02)


@pytest.mark.parametrize(
    ("keys", "page_size", "valid", "message"),
    [
        (torch.zeros(4, 8), 2, None, r"keys must be \[R, S, D\], got \(4, 8\)"),
        (torch.zeros(1, 8, 2, dtype=torch.int32), 2, None, "got torch.int32"),
        (torch.zeros(1, 8, 2, dtype=torch.float64), 2, None, "got torch.float64"),
        (torch.zeros(1, 8, 2), 0, None, "page_size must be at least 1, got 0"),
        (torch.zeros(1, 24, 2), 8, None, "page_size=8, got S=24"),
        (torch.zeros(1, 12, 2), 8, None, "page_size=8, got S=12"),
        (torch.zeros(1, 4, 2), 8, None, "page_size=8, got S=4"),
        (torch.zeros(1, 0, 2), 8, None, "page_size=8, got S=0"),
        (torch.zeros(1, 8, 2), 8, torch.ones(1, 7).bool(), r"valid must be bool \(1, 8\)"),
        (torch.zeros(1, 8, 2), 8, torch.ones(1, 8), r"valid must be bool .* got torch.float32"),
    ],
)  # fmt: skip
def test_errors_say_what_was_expected_and_what_came(
    keys: Tensor, page_size: int, valid: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        balanced_pages(keys, page_size, valid)
