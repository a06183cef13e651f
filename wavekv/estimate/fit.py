"""What of a cache does not fit a machine, and what to change."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from wavekv.config import OffloadConfig, parse_size
from wavekv.estimate.needs import Needs
from wavekv.machine.record import MachineRecord

STEP = 1024
"""Tokens to which the longest context that fits is rounded down."""


class Misfit(NamedTuple):
    """One thing that does not fit."""

    what: str
    do: str


def misfits(config: OffloadConfig, machine: MachineRecord, needs: Needs) -> list[Misfit]:
    """All of them."""
    memory, pages = memory_limits(config, machine)
    if not machine.rates.has_device:
        do = "fewer tokens, a smaller batch, or a machine with more memory"
        return _too_much("memory", needs.total + needs.host, memory, do)
    found = [Misfit("device_budget is too small", refusal) for refusal in needs.refusals]
    do = "fewer tokens, a smaller batch, a smaller prefill_chunk, or a device with more memory"
    found += _too_much("device memory", needs.total, memory, do)
    do = "fewer tokens, a smaller batch, a larger cpu_budget, or a host with more memory"
    if config.host_dtype == "model":
        do = f"pages of small integers (host_dtype), {do}"
    return found + _too_much("host memory for pages", needs.host, pages, do)


def memory_limits(config: OffloadConfig, machine: MachineRecord) -> tuple[int, int]:
    """Bytes of (the device, the host's pages); on a CPU both are the memory there is."""
    if not machine.rates.has_device:
        return machine.host_memory, machine.host_memory
    size = parse_size("cpu_budget", config.cpu_budget)
    pages = int(size * machine.host_memory) if isinstance(size, float) else size
    return machine.device_memory or 0, pages


def longest_that_fits(fits: Callable[[int], bool], num_tokens: int) -> int:
    """The most tokens, in whole `STEP`s and fewer than `num_tokens`, for which `fits` holds; 0 if
    for none. What fits must fit when it is shorter."""
    least, most = 0, -(-num_tokens // STEP)
    while most - least > 1:
        middle = (least + most) // 2
        if fits(middle * STEP):
            least = middle
        else:
            most = middle
    return least * STEP


def _too_much(what: str, needed: int, there: int, do: str) -> list[Misfit]:
    if needed <= there:
        return []
    gib = f"{needed / 2**30:.1f} GiB are needed, {there / 2**30:.1f} GiB are there"
    return [Misfit(f"{what}: {gib}", do)]
