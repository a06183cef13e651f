"""Both compiled merges, whichever of them the number of rows would choose."""

from types import ModuleType

import pytest
import torch

from wavekv.kernels import cpu_merge, merge_state_, reference


def triton_states(device: torch.device) -> ModuleType:
    """The Triton kernel; on a CPU in its interpreter, which a process that has a GPU lacks."""
    if device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton is compiled for the GPU in this process")
    states: ModuleType = pytest.importorskip("wavekv.kernels.cuda.states")
    return states


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 3, 5, 20), (1, 2, 130, 64), (2, 2, 33, 128), (1, 2, 0, 8)]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_merging_in_place_is_merging(device, dtype, shape, transposed) -> None:
    """The Triton kernel, on a CPU in its interpreter; a part may lie as [B, T, H, D]."""
    states = triton_states(device)
    torch.manual_seed(3)
    out, part = (x.to(device) for x in torch.randn(2, *shape))
    lse, part_lse = (x.to(device) for x in 5 * torch.randn(2, *shape[:3]))
    lse.view(-1)[::3] = -torch.inf
    part_lse.view(-1)[::2] = -torch.inf
    part = part.to(dtype)
    if transposed:
        part = part.transpose(1, 2).contiguous().transpose(1, 2)
        part_lse = part_lse.transpose(1, 2).contiguous().transpose(1, 2)
    expected = reference.merge_state(out, lse, part, part_lse)
    states.merge_into(out, lse, part, part_lse)
    torch.testing.assert_close((out, lse), expected, rtol=2e-5, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128, 256])
def test_merging_in_place_does_not_race(width: int) -> None:
    """Threads that hold the same row must all read it before one of them writes it."""
    states = pytest.importorskip("wavekv.kernels.cuda.states")
    for seed in range(20):
        random = torch.Generator("cuda").manual_seed(seed)
        out, part = torch.randn(2, 1, 16, 8192, width, generator=random, device="cuda")
        lse, part_lse = torch.randn(2, 1, 16, 8192, generator=random, device="cuda")
        expected = reference.merge_state(out, lse, part, part_lse)
        states.merge_into(out, lse, part, part_lse)
        torch.testing.assert_close((out, lse), expected, rtol=2e-5, atol=1e-4)


def test_merging_into_what_has_gaps_is_an_error(device: torch.device) -> None:
    states = pytest.importorskip("wavekv.kernels.cuda.states")
    out, part = (x.to(device) for x in torch.randn(2, 1, 2, 3, 4))
    lse = torch.zeros(1, 2, 3, device=device)
    with pytest.raises(ValueError, match="must be contiguous"):
        states.merge_into(out.mT.contiguous().mT, lse, part, lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_that_may_use_the_first_state_is_a_merge(device, dtype) -> None:
    out, part = (x.to(device) for x in torch.randn(2, 2, 3, 7, 8))
    lse, part_lse = (x.to(device) for x in torch.randn(2, 2, 3, 7))
    part = part.to(dtype)
    expected = reference.merge_state(out, lse, part, part_lse)
    actual = merge_state_(out, lse, part, part_lse)
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match="states must be out"):
        merge_state_(*actual, part, part_lse[:1])
