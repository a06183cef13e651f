"""Which kernels a decode step spends its time in, and steps timed one by one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

PROFILED_STEPS = 3


def profile_steps(
    step: Callable[[], object], trace: Path, device: torch.device
) -> list[dict[str, Any]]:
    """Kernels of a step, those that take most time first: name, mean us of a call, calls per step.

    A chrome trace of one step is written to `trace`, which ends in .gz. On a CPU the kernels are
    operators.
    """
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * is_cuda

    def profiled(steps: int) -> profile:
        with profile(activities=activities) as prof:
            for _ in range(steps):
                step()
            if is_cuda:
                torch.cuda.synchronize()
        return prof

    trace.parent.mkdir(parents=True, exist_ok=True)
    profiled(1).export_chrome_trace(str(trace))
    place = DeviceType.CUDA if is_cuda else DeviceType.CPU
    rows = []
    for event in profiled(PROFILED_STEPS).key_averages():
        total = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        if event.device_type == place and total > 0:
            us, calls = total / event.count, event.count / PROFILED_STEPS
            rows.append({"name": event.key, "us": round(us, 2), "calls": round(calls, 2)})
    return sorted(rows, key=lambda row: -row["us"] * row["calls"])


def time_singly(step: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Milliseconds of each step, each waited for before the next, as a reader of the text does."""
    times = []
    for _ in range(count):
        if device.type != "cuda":
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
            continue
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        step()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return times
