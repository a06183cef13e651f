"""Pages in files, one behind the other, read and written in batches by a pool of threads.

Rows in a row become one call (`preadv`, `pwritev`), wherever in memory their pages belong. Reads
run without the interpreter, and take the checksums while pages are in the caches of a core. Around
the cache of the operating system (O_DIRECT) where the file system allows it and the file is not
shared: the host arena is the cache of these pages, and a second copy would be of no use.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wavekv.errors import ContextFormatError

Rows = NDArray[np.int64]

THREADS = 16
"""Calls on their way at once."""
ALIGNMENT = 4096
"""Of places in files, sizes and addresses that O_DIRECT takes everywhere."""
_MOST_BYTES = 1 << 20
"""Of one call."""
_MOST_BUFFERS = 512
"""Of one call; Linux takes 1024."""


class PageFile:
    """Rows of `page_bytes` in files of `rows_per_file` each; row i is in file `i // rows_per_file`.

    Whoever opened the files closes them.
    """

    def __init__(
        self,
        descriptors: Sequence[int],
        names: Sequence[str],
        *,
        rows_per_file: int,
        page_bytes: int,
        is_direct: bool = False,
    ) -> None:
        """names: for errors. is_direct: the descriptors were opened with O_DIRECT."""
        self._descriptors, self._names = list(descriptors), list(names)
        self.rows_per_file, self.page_bytes, self.is_direct = rows_per_file, page_bytes, is_direct

    @classmethod
    def scratch(cls, folder: str | os.PathLike[str], page_bytes: int) -> PageFile:
        """One empty file in `folder` without a name: it goes when the process does, however that
        ends.

        Raises:
            OSError: the folder is not there or cannot be written.
        """
        path = os.path.join(folder, f".wavekv-{os.getpid()}-{threading.get_ident()}.pages")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        direct = getattr(os, "O_DIRECT", 0) if page_bytes % ALIGNMENT == 0 else 0
        try:
            descriptor = os.open(path, flags | direct, 0o600)
        except OSError:
            # file systems in memory have none
            direct = 0
            with suppress(FileNotFoundError):
                os.unlink(path)
            descriptor = os.open(path, flags, 0o600)
        os.unlink(path)
        where = os.path.join(folder, "(pages over cpu_budget)")
        return cls(
            [descriptor],
            [where],
            rows_per_file=np.iinfo(np.int64).max,
            page_bytes=page_bytes,
            is_direct=bool(direct),
        )

    def close(self) -> None:
        """Close the files; more than once does no harm."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def name_of(self, row: int) -> str:
        """The file that holds a row."""
        return self._names[row // self.rows_per_file]

    def read(self, rows: Rows, addresses: Rows) -> Rows:
        """Read rows [n] into memory at addresses [n], and return their checksums [n]. Waits for all
        of them.

        Raises:
            ContextFormatError: a file ends early.
            OSError: the system cannot read one.
        """
        order = np.argsort(rows, kind="stable")
        sorted_addresses = addresses[order]
        in_order = np.empty(len(rows), dtype=np.int64)
        if self.is_direct and (addresses % ALIGNMENT).any():
            calls = self._calls(rows, addresses)
            _each(lambda part: self._read_staged(calls[part]), len(calls))
            for i, address in enumerate(sorted_addresses.tolist()):
                in_order[i] = zlib.crc32(_memory(address, self.page_bytes))
        else:
            files, places = np.divmod(rows[order], self.rows_per_file)
            places *= self.page_bytes
            arrays = files, places, sorted_addresses, in_order
            _each(lambda part: self._read_part(*(array[part] for array in arrays)), len(rows))
        crc32 = np.empty_like(in_order)
        crc32[order] = in_order
        return crc32

    def write(self, rows: Rows, addresses: Rows) -> None:
        """Write memory at addresses [n] to rows [n]. Waits until the system has it.

        Raises:
            OSError: there is no room, or the system cannot write.
        """
        calls = self._calls(rows, addresses)
        _each(lambda part: self._write_part(calls[part]), len(calls))

    def allocate(self, num_rows: int) -> None:
        """Have room on the disk for so many rows, of a file of one's own.

        Raises:
            OSError: there is none; what the file holds stays.
        """
        size = num_rows * self.page_bytes
        if os.fstat(self._descriptors[0]).st_size < size:
            os.posix_fallocate(self._descriptors[0], 0, size)

    def _calls(self, rows: Rows, addresses: Rows) -> list[_Call]:
        """What has to be read or written, as calls in the order of the rows."""
        if not len(rows):
            return []
        order = np.argsort(rows, kind="stable")
        rows, addresses = rows[order], addresses[order]
        most = max(1, min(_MOST_BYTES // self.page_bytes, _MOST_BUFFERS))
        breaks = np.diff(rows) != 1
        breaks |= rows[1:] % self.rows_per_file == 0
        starts = np.concatenate([[0], np.flatnonzero(breaks) + 1, [len(rows)]])
        calls = []
        for first, last in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            for start in range(first, last, most):
                stop = min(start + most, last)
                file, row = divmod(int(rows[start]), self.rows_per_file)
                calls.append((file, row * self.page_bytes, addresses[start:stop].tolist()))
        return calls

    def _read_part(self, files: Rows, places: Rows, addresses: Rows, crc32: Rows) -> None:
        """Read pages [n], in the order of files and places in them, and note their checksums."""
        from wavekv.kernels.cpu_reads import read_pages

        descriptors = np.array(self._descriptors)[files]
        done = read_pages(descriptors, places, addresses, self.page_bytes, crc32)
        # one at a time: a page that cannot be read says why
        for i in range(done, len(places)):
            buffer = _memory(int(addresses[i]), self.page_bytes)
            file, place = int(files[i]), int(places[i])
            got = os.preadv(self._descriptors[file], [buffer], place)
            self._expect(got, self.page_bytes, file, place)
            crc32[i] = zlib.crc32(buffer)

    def _read_staged(self, calls: list[_Call]) -> None:
        """Whole blocks of the disk, of which the pages are copied out."""
        staging = _staging()
        for file, offset, addresses in calls:
            size = len(addresses) * self.page_bytes
            begin = offset - offset % ALIGNMENT
            span = -(-(offset + size - begin) // ALIGNMENT) * ALIGNMENT
            with memoryview(staging)[:span] as whole:
                got = os.preadv(self._descriptors[file], [whole], begin)
                self._expect(min(size, got - (offset - begin)), size, file, offset)
            source = ctypes.addressof(ctypes.c_char.from_buffer(staging)) + offset - begin
            for address in addresses:
                ctypes.memmove(address, source, self.page_bytes)
                source += self.page_bytes

    def _write_part(self, calls: list[_Call]) -> None:
        for file, offset, addresses in calls:
            size = len(addresses) * self.page_bytes
            buffers = list(_buffers(addresses, self.page_bytes))
            done = os.pwritev(self._descriptors[file], buffers, offset)
            if done != size:
                raise OSError(f"{self._names[file]} took {done} of {size} bytes")

    def _expect(self, got: int, size: int, file: int, offset: int) -> None:
        if got != size:
            raise ContextFormatError(
                f"expected {size} bytes at {offset} of {self._names[file]}, got {max(0, got)}; "
                "the file is cut short, take another copy"
            )


_Call = tuple[int, int, list[int]]
"""A file, an offset in it, and the addresses of the pages that are there one behind the other."""


def _memory(address: int, nbytes: int) -> Any:
    """The memory there, as a buffer."""
    return (ctypes.c_char * nbytes).from_address(address)


def _buffers(addresses: list[int], page_bytes: int) -> Iterator[Any]:
    """The memory of pages at these addresses; neighbours as one."""
    start = end = addresses[0]
    for address in addresses:
        if address != end:
            yield _memory(start, end - start)
            start = address
        end = address + page_bytes
    yield _memory(start, end - start)


def _each(do: Callable[[slice], None], count: int) -> None:
    """Share so many things among threads, this one among them: neighbours to one of them."""
    if not count:
        return
    size = -(-count // THREADS)
    first, *others = (slice(i, i + size) for i in range(0, count, size))
    futures = [_pool().submit(do, part) for part in others]
    # all of them, also when one fails: their memory may be given away afterwards
    try:
        do(first)
        for future in futures:
            future.exception()
    except BaseException:
        wait(futures)
        raise
    for future in futures:
        future.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="wavekv-disk")


# a child process has no threads of its parent's
os.register_at_fork(after_in_child=_pool.cache_clear)


_OF_THREAD = threading.local()


def _staging() -> mmap.mmap:
    """Aligned memory of this thread for one call."""
    if not hasattr(_OF_THREAD, "staging"):
        _OF_THREAD.staging = mmap.mmap(-1, _MOST_BYTES + 2 * ALIGNMENT)
    memory: mmap.mmap = _OF_THREAD.staging
    return memory
