"""Files of a context that is being written: written once, counted, and on disk in the end."""

from __future__ import annotations

import errno
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from torch import Tensor

from wavekv.errors import CapacityError
from wavekv.saved.dtypes import memory_of
from wavekv.saved.manifest import FileEntry
from wavekv.saved.replace import sync_directory

_NUM_THREADS = 4
_PAGES_PENDING, _SYNCS_PENDING = 2, 64
"""Files of pages that wait or are being written; other files that wait for the disk."""
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_MIB = 1 << 20


class Output:
    """A new directory and the files in it. Threads wait for the disk, and write files of pages."""

    def __init__(self, root: Path, progress: Callable[[int], None] | None) -> None:
        self.root = root
        self.entries: dict[str, FileEntry] = {}
        """Of the files so far."""
        os.mkdir(root)
        self._progress = progress
        self._folders = {root}
        self._pending: deque[tuple[str, int, Future[None]]] = deque()
        self._pool = ThreadPoolExecutor(_NUM_THREADS, "wavekv-save")

    def write(self, name: str, data: memoryview) -> None:
        """Write a file, and count it. The data may change when this returns."""
        self.write_unlisted(name, data)
        self.entries[name] = FileEntry(len(data), zlib.crc32(data))

    def write_unlisted(self, name: str, data: memoryview) -> None:
        """Write a file that no entry names."""
        path = self._path(name)
        try:
            _write_file(path, data, len(data))
        except OSError as error:
            self._explain(error, name, len(data))
            raise
        self._submit(_SYNCS_PENDING, name, len(data), partial(_sync_file, path))

    def write_pages(self, name: str, rows: Tensor, nbytes: int, crc32: int) -> None:
        """Write the contiguous rows uint8 on a thread, with zeros up to `nbytes`. They must not
        change until `finish`. crc32: of the file, zeros included."""
        data = memory_of(rows)
        task = partial(_write_and_sync, self._path(name), data, nbytes)
        self._submit(_PAGES_PENDING, name, nbytes, task)
        self.entries[name] = FileEntry(nbytes, crc32)

    def require(self, nbytes: int, name: str) -> None:
        """Check that the disk has room.

        Raises:
            CapacityError: it has less.
        """
        free = shutil.disk_usage(self.root).free
        if free < nbytes:
            raise _no_room(self.root / name, nbytes, free)

    def finish(self) -> None:
        """Wait until all files, and the folders that name them, are on disk."""
        self._wait(0)
        for folder in sorted(self._folders, reverse=True):
            sync_directory(folder)

    def close(self) -> None:
        """Stop the threads; what is not written then never is."""
        self._pool.shutdown(cancel_futures=True)

    def _path(self, name: str) -> Path:
        """Where a file goes, in a folder that is there."""
        path = self.root / name
        self._make_folder(path.parent)
        return path

    def _make_folder(self, folder: Path) -> None:
        if folder not in self._folders:
            self._make_folder(folder.parent)
            os.mkdir(folder)
            self._folders.add(folder)

    def _submit(self, most: int, name: str, nbytes: int, task: Callable[[], None]) -> None:
        """Run a task on a thread once fewer than `most` are pending."""
        self._wait(most - 1)
        self._pending.append((name, nbytes, self._pool.submit(task)))

    def _wait(self, most: int) -> None:
        """Until no more than `most` tasks are pending."""
        while len(self._pending) > most:
            name, nbytes, future = self._pending.popleft()
            try:
                future.result()
            except OSError as error:
                self._explain(error, name, nbytes)
                raise
            if self._progress is not None:
                self._progress(nbytes)

    def _explain(self, error: OSError, name: str, nbytes: int) -> None:
        """Raise what an error means if it is that the disk is full."""
        if error.errno in _NO_ROOM:
            raise _no_room(self.root / name, nbytes, shutil.disk_usage(self.root).free) from error


def _write_and_sync(path: Path, data: memoryview, nbytes: int) -> None:
    _write_file(path, data, nbytes)
    _sync_file(path)


def _write_file(path: Path, data: memoryview, nbytes: int) -> None:
    """A new file of so many bytes: zeros follow the data, and take no room."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        os.ftruncate(descriptor, nbytes)
    finally:
        os.close(descriptor)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _no_room(path: Path, nbytes: int, free: int) -> CapacityError:
    return CapacityError(
        f"expected {-(-nbytes // _MIB)} MiB free for {path}, got {free // _MIB} MiB or a quota of "
        "less; free some, or save to another disk"
    )
