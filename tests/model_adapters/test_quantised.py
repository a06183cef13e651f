"""int8 rows: what the demo model's weights are stored as."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from wavekv.model_adapters.quantised import quantise_rows, restore_rows


@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from([0.05, 1.0, 50.0]))
def test_rows_return_within_half_a_step(rows: int, columns: int, size: float) -> None:
    weight = torch.randn(rows, columns) * size
    restored = restore_rows(quantise_rows({"w": weight}))["w"]
    step = weight.abs().amax(1, keepdim=True) / 127
    # half a step, and what rounding the scale to float16 adds at the far end
    assert ((restored - weight).abs() <= step * 0.5 + weight.abs() * 2**-10).all()


def test_vectors_stay_as_they_are() -> None:
    state = {"norm": torch.randn(7)}
    assert torch.equal(restore_rows(quantise_rows(state))["norm"], state["norm"])
