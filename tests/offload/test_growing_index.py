"""An index that grows holds what was put into it, block by block."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from wavekv.index.levels import index_of_pages
from wavekv.kernels.page_index import PageIndex
from wavekv.offload.growing_index import GrowingIndex

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 4)),
        st.tuples(st.just("truncate"), st.integers(0, 9)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 1), min_size=1, max_size=2)),
        st.tuples(st.sampled_from(["clone", "reserve", "fit"]), st.integers(0, 9)),
    ),
    max_size=12,
)


def random_index(random: torch.Generator, batch: int, blocks: int, K: int) -> PageIndex:
    keys, values = torch.randn(2, batch * 2, blocks * K, 3, 8, generator=random)
    counts = torch.full((batch * 2, blocks * K), 3, dtype=torch.int32)
    made = index_of_pages(keys, values, counts, K)
    return PageIndex._make(part.unflatten(0, (batch, 2)) for part in made)


@given(steps=STEPS, seed=st.integers(0, 10**6), K=st.sampled_from([1, 4, 16]))
def test_as_parts_put_together(steps: list, seed: int, K: int) -> None:
    random = torch.Generator().manual_seed(seed)
    grown = GrowingIndex(torch.empty(2, 2, 0, 8), 3, K)
    held, left = random_index(random, 2, 0, K), []
    for name, argument in steps:
        batch, blocks = held.counts.shape[0], len(grown) // K
        if name == "append":
            new = random_index(random, batch, argument, K)
            held = PageIndex._make(torch.cat(pair, 2) for pair in zip(held, new, strict=True))
            grown.append(new)
        elif name == "clone":
            left.append((held, grown))
            grown = grown.clone()
        elif name == "select":
            index = torch.tensor(argument).clamp(max=batch - 1)
            held = PageIndex._make(part[index] for part in held)
            grown.select(index)
        elif name == "truncate":
            kept = min(argument, blocks) * K
            held = held.in_pages(0, kept)
            grown.truncate(kept)
        elif name == "reserve":
            grown.reserve(argument * K)
            assert grown.buffer.counts.shape[2] >= argument * K
        else:
            grown.fit((blocks + argument) * K)
            assert grown.buffer.counts.shape[2] == (blocks + argument) * K
    for expected, one in ((held, grown), *left):
        assert len(one) == expected.counts.shape[2]
        assert one.nbytes == sum(part.numel() * part.element_size() for part in expected)
        assert one.nbytes_of("high", "counts") == expected.high.numel() + expected.counts.numel()
        for ours, theirs in zip(one.view, expected, strict=True):
            assert torch.equal(ours, theirs)


def test_appended_pages_are_copied() -> None:
    made = random_index(torch.Generator().manual_seed(0), 1, 2, 4)
    grown = GrowingIndex(torch.empty(1, 2, 0, 8), 3, 4)
    grown.append(made)
    before = [part.clone() for part in made]
    for part in made:
        part.zero_()
    for ours, theirs in zip(grown.view, before, strict=True):
        assert torch.equal(ours, theirs)
