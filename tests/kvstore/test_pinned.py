"""Pinned memory that is mapped, faulted in and registered."""

from __future__ import annotations

import gc

import pytest
import torch

from wavekv.kvstore import HostArena, KVLayout, MemoryBudget, pinned
from wavekv.kvstore.pinned import pinned_empty


class Runtime:
    """Stands for the CUDA runtime."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.held, self.registered = status, {}, 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.registered += 1
        if self.status == 0:
            self.held[address] = size
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        del self.held[address]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    stand_in = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: stand_in)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return stand_in


@pytest.mark.parametrize("shape", [(1,), (3, 5), (700, 2, 8, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_memory_is_registered_until_its_last_view_goes(runtime, shape, dtype) -> None:
    tensor = pinned_empty(shape, dtype)
    assert (tensor.shape, tensor.dtype) == (shape, dtype)
    assert list(runtime.held.items()) == [(tensor.data_ptr(), tensor.nbytes)]
    view = tensor[-1:]
    del tensor
    gc.collect()
    view.fill_(3)
    assert (view == 3).all()
    assert len(runtime.held) == 1
    del view
    gc.collect()
    assert not runtime.held


def test_memory_that_cannot_be_registered_is_an_error(runtime) -> None:
    runtime.status = 2
    with pytest.raises(RuntimeError, match="cannot be pinned"):
        pinned_empty((4096,), torch.float32)
    gc.collect()
    assert (runtime.registered, runtime.held) == (1, {})


def test_all_of_it_is_faulted_in(monkeypatch, runtime) -> None:
    written = []
    monkeypatch.setattr(pinned.ctypes, "memset", lambda at, _, size: written.append((at, size)))
    tensor = pinned_empty((1_000_003,), torch.uint8)
    end = tensor.data_ptr()
    for start, size in sorted(written):
        assert start == end
        end += size
    assert end == tensor.data_ptr() + tensor.nbytes
    assert len(written) > 1


def test_an_arena_holds_and_frees_it(runtime) -> None:
    layout = KVLayout(8, 64, torch.float32)
    arena = HostArena(layout, MemoryBudget(1 << 22), pin=True, chunk_bytes=1 << 18)
    ids = arena.allocate(100)
    assert len(runtime.held) == len(arena.chunks) > 1
    pages = torch.randn(100, *layout.page_shape)
    arena.write(ids, pages)
    assert torch.equal(arena.read(ids), pages)
    del arena
    gc.collect()
    assert not runtime.held


@pytest.mark.gpu
def test_a_device_copies_to_and_from_it() -> None:
    tensor = pinned_empty((1 << 20,), torch.float32)
    assert tensor.is_pinned()
    numbers = torch.randn(1 << 20, device="cuda")
    tensor.copy_(numbers, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(tensor, numbers.cpu())
    back = torch.empty_like(numbers)
    back.copy_(tensor, non_blocking=True)
    assert torch.equal(back, numbers)
