"""All rates of this machine, in some seconds: 10 with two cores, 15 with a GPU."""

from __future__ import annotations

from contextlib import suppress

import torch

from wavekv.machine.arithmetic import (
    HEAD_DIMS,
    attention_flops,
    device_copy,
    matmul_flops,
    page_build,
)
from wavekv.machine.bus import bus_rates
from wavekv.machine.disk import disk_rates
from wavekv.machine.environment import Environment
from wavekv.machine.host import host_read
from wavekv.machine.rates import Rates


def measure(environment: Environment) -> Rates:
    """Measure anew. What it allocates it frees; other work on the machine shows in the rates."""
    has_device = environment.device is not None
    device = torch.device("cuda" if has_device else "cpu")
    sequential = random = None
    with suppress(OSError):
        # a disk without room is a problem to report, not the end
        sequential, random = disk_rates()
    with torch.inference_mode(False), torch.no_grad():
        of_device = {}
        if has_device:
            can_fetch = environment.captured_refusal is None
            of_device = bus_rates(device, can_fetch=can_fetch)._asdict()
            of_device["device_copy"] = device_copy(device)
        rates = Rates(
            host_read=host_read(),
            disk_sequential=sequential,
            disk_random=random,
            page_build=page_build(device),
            matmul_flops=matmul_flops(device),
            attention_flops={str(dim): attention_flops(device, dim) for dim in HEAD_DIMS},
            **of_device,
        )
    if has_device:
        torch.cuda.empty_cache()
    return rates
