"""attention_recall and relative_error on cases with known answers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wavekv.index import attention_recall, relative_error


def test_recall_of_known_weights() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    selected = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    torch.testing.assert_close(attention_recall(logits, selected), torch.tensor([0.7, 0.0, 1.0]))


@given(T=st.integers(2, 40), shift=st.floats(-1e3, 1e3), seed=st.integers(0, 2**16))
def test_recall_of_a_split_adds_up_and_ignores_shifts(T: int, shift: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(2, 3, T, generator=generator, dtype=torch.float64)
    selected = torch.rand(2, 3, T, generator=generator) < 0.5
    inside, outside = attention_recall(logits, selected), attention_recall(logits, ~selected)
    torch.testing.assert_close(inside + outside, torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(attention_recall(logits + shift, selected), inside)


def test_recall_of_masked_tokens_is_zero_and_of_nothing_is_nan() -> None:
    logits = torch.tensor([[0.0, -math.inf], [-math.inf, -math.inf]], dtype=torch.bfloat16)
    got = attention_recall(logits, torch.tensor([False, True]))
    assert got.dtype == torch.float32
    assert got[0] == 0
    assert got[1].isnan()


def test_recall_needs_a_mask() -> None:
    with pytest.raises(ValueError, match=r"bool mask \[..., T\], got torch.int64"):
        attention_recall(torch.zeros(3), torch.tensor([0, 2, 1]))


def test_relative_error_of_known_vectors() -> None:
    reference = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    out = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    assert relative_error(out, reference).tolist() == [0.0, 1.0, 0.0, math.inf]


def test_relative_error_computes_in_float32_at_least() -> None:
    out = torch.full((2, 512), 200.0, dtype=torch.float16)
    assert relative_error(out, out / 2).dtype == torch.float32
    torch.testing.assert_close(relative_error(out, out / 2), torch.ones(2))
    assert relative_error(out, out.double()).dtype == torch.float64
