"""Packed rows do what growing tensors do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wavekv.growing import GrowingTensor
from wavekv.kernels.means import KEY_BITS, VALUE_BITS, round_rows
from wavekv.offload.packed import PackedRows, growing_rows

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 9)),
        st.tuples(st.just("truncate"), st.integers(0, 20)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 1), min_size=1, max_size=2)),
        st.tuples(st.just("clone"), st.none()),
    ),
    max_size=12,
)


@given(steps=STEPS, seed=st.integers(0, 10**6), bits=st.sampled_from([KEY_BITS, VALUE_BITS]))
def test_as_a_growing_tensor(steps: list, seed: int, bits: int) -> None:
    random = torch.Generator().manual_seed(seed)
    like = torch.empty(2, 3, 0, 7, dtype=torch.bfloat16)
    plain, packed = (growing_rows(like, bits, is_packed=each) for each in (False, True))
    assert isinstance(plain, GrowingTensor)
    assert isinstance(packed, PackedRows)
    left: list[tuple[GrowingTensor, PackedRows]] = []
    for name, argument in steps:
        if name == "append":
            size = plain.view.shape[0], 3, argument, 7
            rows = round_rows(torch.randn(size, generator=random).bfloat16(), bits)
            plain.append(rows)
            packed.append(rows)
        elif name == "clone":
            left.append((plain, packed))
            plain, packed = plain.clone(), packed.clone()
        elif name == "select":
            index = torch.tensor(argument).clamp(max=plain.view.shape[0] - 1)
            plain.select(index)
            packed.select(index)
        else:
            plain.truncate(argument)
            packed.truncate(argument)
    for one, other in ((plain, packed), *left):
        assert len(one) == len(other)
        assert torch.equal(one.view, other.view)


def test_packed_rows_are_smaller() -> None:
    like = torch.empty(1, 2, 0, 128, dtype=torch.bfloat16)
    rows = round_rows(torch.randn(1, 2, 10, 128).bfloat16(), VALUE_BITS)
    sizes = []
    for bits in (KEY_BITS, VALUE_BITS):
        packed = PackedRows(like, bits)
        packed.append(round_rows(rows, bits))
        sizes.append(packed.nbytes)
    assert sizes == [2 * 10 * (128 + 4), 2 * 10 * (64 + 4)]


@pytest.mark.parametrize("is_packed", [False, True])
def test_appended_rows_are_copied(is_packed: bool) -> None:
    rows = round_rows(torch.randn(1, 2, 3, 8), KEY_BITS)
    kept = growing_rows(rows[:, :, :0], KEY_BITS, is_packed=is_packed)
    kept.append(rows)
    before = rows.clone()
    rows.zero_()
    assert torch.equal(kept.view, before)
