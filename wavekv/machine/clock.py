"""Timing a piece of work: its best of some runs, which other processes disturb least."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def best_seconds(run: Callable[[], object], *, repeats: int = 5) -> float:
    """Seconds of the quickest of `repeats` runs, after one that is not counted."""
    run()
    return min(_seconds(run) for _ in range(repeats))


def best_device_seconds(run: Callable[[], object], *, repeats: int = 5) -> float:
    """The same on the current CUDA device, between events around each run."""
    run()
    torch.cuda.synchronize()
    times: list[float] = []
    for _ in range(repeats):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        run()
        ended.record()
        ended.synchronize()
        times.append(1e-3 * began.elapsed_time(ended))
    return min(times)


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
