"""Both compiled merges, whichever of them the number of rows would choose."""

import pytest
import torch

from wavekv.kernels import cpu_merge, reference


@pytest.mark.parametrize("name", ["merge_serial", "merge_parallel"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 20), (1000, 64)])
def test_each_merge_writes_every_row(name: str, rows: int, width: int) -> None:
    out_a, out_b = torch.randn(2, rows, width)
    lse_a, lse_b = 5 * torch.randn(2, rows)
    lse_a[::3] = lse_b[::2] = -torch.inf
    out, lse = torch.full((rows, width), torch.nan), torch.full((rows,), torch.nan)
    states = (out_a, lse_a, out_b, lse_b, out, lse)
    getattr(cpu_merge, name)(rows, width, *(part.data_ptr() for part in states))
    expected = reference.merge_state(out_a, lse_a, out_b, lse_b)
    torch.testing.assert_close((out, lse), expected, rtol=2e-5, atol=2e-5)


def test_the_cache_on_disk_can_tell_the_merges_apart() -> None:
    names = {cpu_merge.merge_serial.py_func, cpu_merge.merge_parallel.py_func}
    assert len({function.__qualname__ for function in names}) == 2
