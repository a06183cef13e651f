"""Whatever is done to an index: it holds the keys it was given, and finds them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from wavekv.index import IndexParams, WaveIndex

from .index_cases import FEW, assert_right, assert_same_tensors, snapshot

D = 6
COUNTS = st.one_of(st.integers(0, 8), st.integers(0, 120))


class IndexMachine(RuleBasedStateMachine):
    """An index beside a list of what it should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()

    @initialize(
        page_size=st.sampled_from([1, 2, 4]),
        doublings=st.integers(0, 3),
        has_values=st.booleans(),
        has_sample=st.booleans(),
        count=COUNTS,
        seed=st.integers(0, 2**31),
    )
    def build(self, page_size, doublings, has_values, has_sample, count, seed) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        self.params = IndexParams(page_size=page_size, segment=16 * page_size << doublings)
        self.sample = self.randn(9) if has_sample else None
        self.keys = self.randn(count)
        self.values = self.randn(count) if has_values else None
        self.index = self.built()

    def randn(self, count: int) -> Tensor:
        return torch.randn(2, count, D, generator=self.rng)

    def built(self) -> WaveIndex:
        return WaveIndex.build(self.keys, self.params, values=self.values, query_sample=self.sample)

    @rule(count=COUNTS)
    def append(self, count: int) -> None:
        n, new = len(self.index), self.randn(count)
        self.keys = torch.cat([self.keys, new], 1)
        values = None
        if self.values is not None:
            values = self.randn(count)
            self.values = torch.cat([self.values, values], 1)
        assert self.index.append(new, values) == range(n, n + count)

    @precondition(lambda self: self.keys.shape[1] > 0)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        n = data.draw(st.integers(0, self.keys.shape[1]))
        self.index.truncate(n)
        self.keys = self.keys[:, :n]
        if self.values is not None:
            self.values = self.values[:, :n]

    @rule(mmap=st.booleans())
    def save_and_load(self, mmap: bool) -> None:
        path = Path(self.folder.name) / "index"
        self.index.save(path)
        if mmap:
            with WaveIndex.load(path, mmap=True) as mapped:
                self.search_in(mapped, 3, 0.5)
        else:
            self.index.close()
            self.index = WaveIndex.load(path)

    @rule(k=st.integers(1, 200), budget=st.sampled_from([0.05, 0.5, 1.0]))
    def search(self, k: int, budget: float) -> None:
        self.search_in(self.index, k, budget)

    def search_in(self, index: WaveIndex, k: int, budget: float) -> None:
        queries = self.randn(3)
        result = index.search(queries, k, budget=budget)
        assert_right(result, self.keys, queries, k)
        if budget == 1.0:
            best = (queries @ self.keys.mT).sort(-1, descending=True).values[..., :k]
            found = result.scores[..., : best.shape[2]]
            torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-5)

    @precondition(lambda self: self.values is not None)
    @rule(budget=st.sampled_from([1, 0.3, 1.0]))
    def attend(self, budget: float) -> None:
        queries = self.randn(3)
        result = self.index.attend(queries, budget=budget)
        if self.keys.shape[1] == 0:
            assert (result.out == 0).all()
            return
        assert result.out.isfinite().all()
        if budget == 1.0 and isinstance(budget, float):
            weights = (D**-0.5 * queries.double() @ self.keys.double().mT).softmax(-1)
            out = (weights @ self.values.double()).float()
            torch.testing.assert_close(result.out, out, rtol=1e-4, atol=1e-4)

    @invariant()
    def holds_what_it_was_given(self) -> None:
        if hasattr(self, "index"):
            assert len(self.index) == self.keys.shape[1]

    def teardown(self) -> None:
        try:
            if hasattr(self, "index"):
                # the index is a function of its keys, whatever its past
                assert_same_tensors(snapshot(self.index), snapshot(self.built()))
        finally:
            self.folder.cleanup()


def test_an_index_forgets_nothing_and_finds_everything() -> None:
    run_state_machine_as_test(
        IndexMachine,
        settings=settings(FEW, max_examples=FEW.max_examples * 2, stateful_step_count=8),
    )
