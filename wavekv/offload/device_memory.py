"""What there is of device memory, what of it a cache may take, and what to say if that is too
little."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from wavekv.config import OffloadConfig, parse_size
from wavekv.errors import CapacityError
from wavekv.offload.context import LayerContext

LIBRARY_BYTES = 128 << 20
"""Workspaces that cuBLAS keeps: 32 MiB on Hopper for each stream that it was used on, and there are
four: of the model, of page builders, of a captured step and of growth."""


def free_memory(device: torch.device) -> int:
    """Bytes that are free, what torch holds for later allocations included."""
    if device.type != "cuda":
        return 1 << 40
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def held_memory(contexts: Iterable[LayerContext]) -> int:
    """Bytes of device memory that contexts hold: index and steady zones, without room for more."""
    return sum(context.paged.statistics_nbytes + context.steady.nbytes for context in contexts)


def device_budget(config: OffloadConfig, available: int) -> int:
    """Bytes that a cache may take in all. available: those that are free or that it holds."""
    size = parse_size("device_budget", config.device_budget)
    return min(available, int(size * available) if isinstance(size, float) else size)


def too_much(what: str, parts: Mapping[str, int], budget: int, do: str) -> CapacityError:
    """The error for `what` if it takes `parts`, in bytes by what they are for, of `budget`."""
    listed = ", ".join(f"{_mib(size)} for {name}" for name, size in parts.items() if size)
    return CapacityError(
        f"{what} needs {_mib(sum(parts.values()))} of device memory ({listed}), device_budget "
        f"comes to {_mib(budget)}; {do}"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
