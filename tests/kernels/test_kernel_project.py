"""project: numba against the torch reference, and what it is for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wavekv.kernels import project, use_backend


@given(
    blocks=st.integers(1, 5),
    rows=st.sampled_from([1, 2, 3, 16, 300, 1024]),
    width=st.sampled_from([1, 7, 64, 130]),
    size=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 2**31),
)
def test_project_equals_reference(blocks, rows, width, size, seed) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(blocks, rows, width, generator=rng) * size
    weight = torch.randn(blocks, rows, generator=rng)
    results = []
    for backend in ("numba", "torch"):
        with use_backend(backend):
            results.append(project(x, weight))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3 * size)


def test_blocks_do_not_influence_each_other() -> None:
    x, weight = torch.randn(4, 40, 16), torch.randn(4, 40)
    together = project(x, weight)
    alone = torch.cat([project(x[i : i + 1], weight[i : i + 1]) for i in range(4)])
    assert torch.equal(together, alone)


def test_repeated_it_finds_the_principal_direction() -> None:
    axis = torch.nn.functional.normalize(torch.randn(1, 1, 32), dim=-1)
    x = torch.randn(1, 500, 32) + 9 * torch.randn(1, 500, 1) * axis
    score = torch.ones(1, 500)
    for _ in range(6):
        score = project(x, score)
    share = torch.corrcoef(torch.stack([score[0], (x @ axis.mT)[0, :, 0]]))[0, 1]
    assert abs(share) > 0.99


@pytest.mark.parametrize("shape", [(2, 3), (1, 4)])
def test_weights_that_do_not_fit_are_named(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"weight must be \(2, 4\)"):
        project(torch.zeros(2, 4, 8), torch.zeros(shape))
