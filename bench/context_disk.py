"""A disk without anything in between, and what the operating system keeps of files."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

BLOCK_BYTES = 4 << 20
ALIGNMENT = 4096


def filesystem_of(folder: Path) -> str:
    """The kind of file system that a folder is on, "" where the system does not say."""
    found = "", ""
    with suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, place, kind = line.split()[:3]
            if folder.resolve().is_relative_to(place) and len(place) >= len(found[0]):
                found = place, kind
    return found[1]


def files_in(folder: Path) -> list[Path]:
    """All files under a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextmanager
def opened(paths: Iterable[Path], flags: int = os.O_RDONLY) -> Iterator[list[int]]:
    """Descriptors of files."""
    descriptors: list[int] = []
    try:
        for path in paths:
            descriptors.append(os.open(path, flags))
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def drop_cached(descriptors: Sequence[int]) -> float:
    """Have the system forget what it keeps of files, as far as nobody maps them; the share of their
    bytes that it keeps nevertheless."""
    for descriptor in descriptors:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return cached_share(descriptors)


def fill_cached(descriptors: Sequence[int]) -> float:
    """Have the system keep files; the share of their bytes that it keeps."""
    block = bytearray(BLOCK_BYTES)
    for descriptor in descriptors:
        for place in range(0, os.fstat(descriptor).st_size, BLOCK_BYTES):
            os.preadv(descriptor, [block], place)
    return cached_share(descriptors)


def cached_share(descriptors: Sequence[int]) -> float:
    """The share of the bytes of files that the system keeps in memory."""
    counts = [_cached_blocks(descriptor) for descriptor in descriptors]
    return sum(cached for cached, _ in counts) / max(1, sum(blocks for _, blocks in counts))


def _cached_blocks(descriptor: int) -> tuple[int, int]:
    """(blocks in memory, blocks)."""
    size = os.fstat(descriptor).st_size
    if not size:
        return 0, 0
    with mmap.mmap(descriptor, size, prot=mmap.PROT_READ) as mapped:
        whole = np.frombuffer(mapped, dtype=np.uint8)
        flags = np.empty(-(-size // mmap.PAGESIZE), dtype=np.uint8)
        where = [ctypes.c_void_p(x) for x in (whole.ctypes.data, size, flags.ctypes.data)]
        status = ctypes.CDLL(None, use_errno=True).mincore(*where)
        # the mapping is not closed before its views are gone
        del whole
    if status:
        raise OSError(ctypes.get_errno(), "mincore")
    return int((flags & 1).sum()), len(flags)


def write_raw(folder: Path, sizes: Sequence[int]) -> float:
    """Write files of such sizes, one after another, until they are on the disk; the seconds."""
    folder.mkdir()
    # not compressible
    block = memoryview(os.urandom(BLOCK_BYTES))
    began = time.perf_counter()
    paths = [folder / str(number) for number in range(len(sizes))]
    with opened(paths, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptors:
        for descriptor, size in zip(descriptors, sizes, strict=True):
            while size:
                size -= os.write(descriptor, block[: min(size, BLOCK_BYTES)])
        for descriptor in descriptors:
            os.fsync(descriptor)
    return time.perf_counter() - began


def read_raw(folder: Path) -> float:
    """Read the files of a folder, one after another, around the cache; the seconds."""
    paths = files_in(folder)
    with mmap.mmap(-1, BLOCK_BYTES) as block, opened(paths, direct_flags(folder)) as descriptors:
        began = time.perf_counter()
        for descriptor in descriptors:
            place = 0
            while got := os.preadv(descriptor, [block], place):
                place += got
                # the end of a file, which is not aligned
                if got % ALIGNMENT:
                    break
        return time.perf_counter() - began


def direct_flags(folder: Path) -> int:
    """To open files of a folder around the cache, where its file system has that."""
    direct = os.O_RDONLY | getattr(os, "O_DIRECT", 0)
    with suppress(OSError, IndexError), opened(files_in(folder)[:1], direct):
        return direct
    return os.O_RDONLY


def reopened(descriptor: int, flags: int) -> Any:
    """A context with another descriptor of an open file, which need not have a name."""
    return opened([Path(f"/proc/self/fd/{descriptor}")], flags)


def unnamed_files(folder: Path) -> list[int]:
    """Descriptors of this process of files that are in a folder without a name."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            place = os.readlink(entry)
            if place.startswith(f"{folder.resolve()}/") and place.endswith(" (deleted)"):
                found.append(int(entry.name))
    return found
