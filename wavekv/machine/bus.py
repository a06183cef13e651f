"""How fast bytes go between host memory and a CUDA device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from wavekv.kernels.step import StepArena, StepPool, StepShape, empty_pool, empty_scratch
from wavekv.machine.clock import best_device_seconds

_PINNED_BYTES = 512 << 20
_HEADS, _PAGE, _DIM = 8, 8, 128
_MISSES = 2048
"""Pages of each KV head that one fetch brings: 64 MiB together."""


class BusRates(NamedTuple):
    """As `Rates` has them."""

    h2d: float
    d2h: float
    fetch: float | None
    pin_seconds_per_gib: float


def bus_rates(device: torch.device, *, can_fetch: bool) -> BusRates:
    """Pin some memory and copy it both ways; with Triton (can_fetch) also fetch single pages."""
    began = time.perf_counter()
    host = torch.empty(_PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
    pinning = time.perf_counter() - began
    there = torch.empty_like(host, device=device)
    to_device = best_device_seconds(lambda: there.copy_(host, non_blocking=True))
    to_host = best_device_seconds(lambda: host.copy_(there, non_blocking=True))
    fetched = None
    if can_fetch:
        run, pool = random_fetch(host, device)
        fetched = pool.pages.nbytes / best_device_seconds(run)
    return BusRates(
        h2d=host.nbytes / to_device,
        d2h=host.nbytes / to_host,
        fetch=fetched,
        pin_seconds_per_gib=pinning * 2**30 / host.nbytes,
    )


def random_fetch(host: Tensor, device: torch.device) -> tuple[Callable[[], None], StepPool]:
    """A fetch of pages of 4 KiB from random places of `host` [bytes] uint8, as a decode step does
    it, and the pool that they come to."""
    from wavekv.kernels.cuda import fetch

    shape = StepShape(
        batch=1,
        kv_heads=_HEADS,
        group=1,
        head_dim=_DIM,
        page_size=_PAGE,
        capacity=_MISSES,
        most=_MISSES,
        slots=_MISSES,
        misses=_MISSES,
        sinks=0,
        ring=1,
        span_pages=1024,
        block_pages=16,
        scale=1.0,
    )
    pool = empty_pool(shape, torch.bfloat16, device)
    scratch = empty_scratch(shape, torch.bfloat16, device)
    num_pages = host.nbytes // pool.pages[0, 0, 0].nbytes
    scratch.wanted.copy_(torch.randint(num_pages, scratch.wanted.shape))
    scratch.victims.copy_(torch.arange(_MISSES, dtype=torch.int32).expand_as(scratch.victims))
    scratch.num_misses.fill_(_MISSES)
    arena = StepArena(torch.tensor([host.data_ptr()], device=device), num_pages, [host])
    return lambda: fetch(arena, pool, scratch, shape), pool
