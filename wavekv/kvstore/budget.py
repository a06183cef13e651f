"""A cap on host memory, shared by everything that stores pages for one cache."""

from __future__ import annotations

from pathlib import Path
from shutil import disk_usage

import psutil

from wavekv.errors import CapacityError

_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes this process may still use: the machine's, or less where a cgroup (v2) says so.

    Cached files that the kernel gives up first, such as weights read long ago, count as available.
    """
    available: int = psutil.virtual_memory().available
    try:
        # "max", for no limit, is a ValueError too
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text()) - _reclaimable()
    except (OSError, ValueError):
        return available
    return max(0, min(available, limit - used))


def _reclaimable() -> int:
    try:
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


class MemoryBudget:
    """Counts bytes against a limit."""

    def __init__(self, limit: int, name: str = "cpu_budget", of: str = "host RAM") -> None:
        """name: of the setting, and `of`: what it is a budget of, for errors."""
        self.limit, self.name, self.of = limit, name, of
        self.used = 0

    @classmethod
    def of_host(cls, size: float | int) -> MemoryBudget:
        """A `cpu_budget` of `size` bytes, or of a share of the available memory if a float."""
        return cls(int(size * available_memory()) if isinstance(size, float) else size)

    @classmethod
    def of_disk(cls, size: float | int, folder: str | None) -> MemoryBudget:
        """A `disk_budget` of `size` bytes, or of a share of what is free in `folder` if a float;
        of nothing without a folder.

        Raises:
            OSError: the folder is not there.
        """
        if folder is None:
            return cls(0, "disk_budget", "disk")
        free = disk_usage(folder).free
        limit = int(size * free) if isinstance(size, float) else size
        return cls(limit, "disk_budget", f"disk in {folder}")

    @property
    def free(self) -> int:
        """Bytes that may still be taken."""
        return self.limit - self.used

    def take(self, num_bytes: int) -> None:
        """Count `num_bytes` as used.

        Raises:
            CapacityError: they do not fit; nothing is counted then.
        """
        self.check(num_bytes)
        self.used += num_bytes

    def check(self, num_bytes: int) -> None:
        """Raise CapacityError if `num_bytes` more do not fit."""
        if num_bytes > self.free:
            raise CapacityError(
                f"pages need {num_bytes / 2**20:.1f} MiB more, but {self.name} is "
                f"{self.limit / 2**20:.1f} MiB of {self.of} and {self.used / 2**20:.1f} MiB are in "
                f"use; raise {self.name}, shorten the context, or free another cache"
            )

    def give(self, num_bytes: int) -> None:
        """Count `num_bytes` as free again."""
        self.used -= num_bytes
