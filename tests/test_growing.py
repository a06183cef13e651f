"""GrowingTensor against plain tensors."""

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from wavekv.growing import GrowingTensor


class GrowingMachine(RuleBasedStateMachine):
    """Any sequence of changes leaves the rows that a concatenation would hold."""

    @initialize(batch=st.integers(1, 3), dim=st.sampled_from([1, 2]))
    def start(self, batch: int, dim: int) -> None:
        self.dim = dim
        self.model = torch.empty(batch, 2, 0, 3) if dim == 2 else torch.empty(batch, 0, 3)
        self.grown = GrowingTensor(self.model.clone(), dim)
        self.left_behind: list[tuple[GrowingTensor, torch.Tensor]] = []

    @rule(count=st.integers(0, 40))
    def append(self, count: int) -> None:
        rows = torch.randn(self.shape(count))
        self.grown.append(rows)
        self.model = torch.cat([self.model, rows], self.dim)
        rows.fill_(torch.nan)

    @rule(count=st.integers(0, 4))
    def insert_front(self, count: int) -> None:
        self.grown.insert_front(count)
        self.model = torch.cat([torch.zeros(self.shape(count)), self.model], self.dim)

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        start = data.draw(st.integers(0, self.length))
        count = data.draw(st.integers(0, self.length - start))
        self.grown.drop(start, count)
        parts = [self.model.narrow(self.dim, 0, start)]
        parts.append(self.model.narrow(self.dim, start + count, self.length - start - count))
        self.model = torch.cat(parts, self.dim)
        # memory follows: what a long prefill took does not stay
        assert self.grown._buffer.shape[self.dim] <= max(8 * self.length, self.length)

    @rule(data=st.data(), beyond=st.booleans())
    def truncate(self, data: st.DataObject, beyond: bool) -> None:
        length = data.draw(st.integers(0, self.length))
        self.grown.truncate(length + beyond * self.length)
        self.model = self.model.narrow(self.dim, 0, min(length + beyond * self.length, self.length))

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        row = st.integers(0, self.model.shape[0] - 1)
        index = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=4)))
        self.grown.select(index)
        self.model = self.model[index]

    @precondition(lambda self: len(self.left_behind) < 3)
    @rule()
    def clone(self) -> None:
        self.left_behind.append((self.grown, self.model.clone()))
        self.grown = self.grown.clone()

    @invariant()
    def same(self) -> None:
        if not hasattr(self, "grown"):
            return
        for grown, model in [(self.grown, self.model), *self.left_behind]:
            assert len(grown) == model.shape[self.dim]
            assert torch.equal(grown.view, model)
            assert grown.nbytes == model.numel() * 4

    @property
    def length(self) -> int:
        return self.model.shape[self.dim]

    def shape(self, count: int) -> list[int]:
        shape = list(self.model.shape)
        shape[self.dim] = count
        return shape


TestGrowing = GrowingMachine.TestCase


def test_appending_one_by_one_seldom_copies() -> None:
    grown = GrowingTensor(torch.empty(1, 0, 2, dtype=torch.bfloat16), dim=1)
    buffers = []
    for step in range(1000):
        grown.append(torch.full((1, 1, 2), step, dtype=torch.bfloat16))
        if not buffers or buffers[-1] is not grown._buffer:
            buffers.append(grown._buffer)
    assert len(buffers) <= 11
    assert grown.nbytes == 4000


def test_a_window_that_slides_seldom_copies() -> None:
    grown = GrowingTensor(torch.empty(1, 0, 2), dim=1)
    grown.append(torch.zeros(1, 64, 2))
    for _ in range(20):
        grown.append(torch.zeros(1, 256, 2))
        before = grown._buffer
        grown.drop(4, 256)
        assert grown._buffer is before
