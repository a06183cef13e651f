"""What this process runs on: versions, memory, and what of the device can be used."""

from __future__ import annotations

import os
import platform
import resource
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from wavekv import __version__
from wavekv.kvstore import available_memory

LIBRARIES = ("torch", "transformers", "triton", "numba", "numpy")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, slots=True)
class Environment:
    """All sizes in bytes; None for what is not there."""

    wavekv: str
    python: str
    platform: str
    host: str
    libraries: dict[str, str | None]
    cores: int
    """That this process may use."""
    threads: int
    """That torch uses."""
    memory: int
    memory_available: int
    """To this process, at the time."""
    cgroup_limit: int | None
    memlock_limit: int | None
    """Of memory that this process may lock; None for no limit."""
    torch_cuda: str | None
    """The CUDA version that torch was built for."""
    device: str | None
    device_memory: int | None
    device_free: int | None
    """At the time, without what this process has for tensors."""
    capability: str | None
    can_pin: bool
    captured_refusal: str | None
    """Why decode steps are not captured as a graph; None if they can be."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def describe() -> Environment:
    """This process and its machine. Cost: starting CUDA, where there is a device."""
    has_device = torch.cuda.is_available()
    found = {name: _version(name) for name in LIBRARIES}
    free = total = name = capability = None
    if has_device:
        free, total = torch.cuda.mem_get_info()
        free += torch.cuda.memory_reserved()
        name = torch.cuda.get_device_name()
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return Environment(
        wavekv=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        host=platform.node(),
        libraries=found,
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        memory=psutil.virtual_memory().total,
        memory_available=available_memory(),
        cgroup_limit=_cgroup_limit(),
        memlock_limit=_memlock_limit(),
        torch_cuda=torch.version.cuda,
        device=name,
        device_memory=total,
        device_free=free,
        capability=capability,
        can_pin=has_device and _can_pin(),
        captured_refusal=_captured_refusal(has_device, found["triton"]),
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cgroup_limit() -> int | None:
    try:
        return int(_CGROUP_LIMIT.read_text())
    except (OSError, ValueError):
        return None


def _memlock_limit() -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _can_pin() -> bool:
    try:
        return torch.empty(1 << 20, dtype=torch.uint8, pin_memory=True).is_pinned()
    except RuntimeError:
        return False


def _captured_refusal(has_device: bool, triton: str | None) -> str | None:
    if not has_device:
        return "there is no CUDA device"
    return None if triton else "triton is not installed"
