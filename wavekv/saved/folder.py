"""The directory of a context as it was when it was opened: files are looked up in it, never by
path, so another context that takes its place, or a link that leads elsewhere, is not read."""

from __future__ import annotations

import mmap
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wavekv.errors import ClosedError, ContextFormatError
from wavekv.saved.manifest import FileEntry

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_BLOCK_BYTES = 1 << 20


class Folder:
    """An open directory."""

    def __init__(self, path: Path) -> None:
        """Raises:
        OSError: it cannot be opened.
        """
        self.path = path
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __del__(self) -> None:
        self.close()

    @property
    def descriptor(self) -> int:
        """Raises:
        ClosedError: it is closed.
        """
        if self._descriptor < 0:
            raise ClosedError(f"expected {self.path} open, got it closed; open the context again")
        return self._descriptor

    def close(self) -> None:
        """Close the directory; what is mapped stays."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def open(self, name: str) -> int:
        """A descriptor of a file, for reading. The caller closes it.

        Raises:
            OSError: it is not there, or is or is behind a link.
            ContextFormatError: it is no regular file.
        """
        *folders, last = name.split("/")
        parent, opened = self.descriptor, []
        try:
            for folder in folders:
                parent = os.open(folder, _FLAGS | os.O_DIRECTORY, dir_fd=parent)
                opened.append(parent)
            # what waits for a writer, as a pipe does, must not be waited for
            descriptor = os.open(last, _FLAGS | os.O_NONBLOCK, dir_fd=parent)
        finally:
            for folder_descriptor in opened:
                os.close(folder_descriptor)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise ContextFormatError(
                f"expected {self.path / name} to be a file, got something else; take another copy"
            )
        return descriptor

    def read(self, name: str) -> bytes:
        """All of a small file.

        Raises:
            OSError, ContextFormatError: as `open`.
        """
        with os.fdopen(self.open(name), "rb") as file:
            return file.read()

    def open_sized(self, name: str, entry: FileEntry) -> int:
        """`open`, of a file of the size that the manifest says.

        Raises:
            ContextFormatError: it is not.
        """
        try:
            descriptor = self.open(name)
        except OSError as error:
            raise ContextFormatError(
                f"expected a file {self.path / name} as the manifest says, got {error.strerror}; "
                "take another copy, or open it again if another process replaced it just now"
            ) from error
        found = os.fstat(descriptor).st_size
        if found != entry.nbytes:
            os.close(descriptor)
            raise ContextFormatError(
                f"expected {self.path / name} of bytes={entry.nbytes} as the manifest says, got "
                f"{found}; it is damaged, take another copy"
            )
        return descriptor

    @contextmanager
    def opened(self, name: str, entry: FileEntry) -> Iterator[int]:
        """`open_sized` for a with block."""
        descriptor = self.open_sized(name, entry)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def map(self, name: str, entry: FileEntry) -> mmap.mmap:
        """A file in memory that may be written and keeps the changes to itself.

        Raises:
            ContextFormatError: as `open_sized`, or it is empty.
        """
        if not entry.nbytes:
            raise ContextFormatError(
                f"expected {self.path / name} of bytes > 0, got an empty file; take another copy"
            )
        with self.opened(name, entry) as descriptor:
            return mmap.mmap(descriptor, entry.nbytes, access=mmap.ACCESS_COPY)

    def check(self, name: str, entry: FileEntry) -> None:
        """Read a file and compare its checksum with that of the manifest.

        Raises:
            ContextFormatError: it is another, or the file is not there or of another size.
            OSError: the disk does not give it.
        """
        found = 0
        buffer = bytearray(min(entry.nbytes, _BLOCK_BYTES))
        # read, not mapped: a page that the disk does not give is an error then, not a signal
        with self.opened(name, entry) as descriptor:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            while count := os.readv(descriptor, [buffer]) if buffer else 0:
                found = zlib.crc32(memoryview(buffer)[:count], found)
        if found != entry.crc32:
            raise ContextFormatError(
                f"expected {self.path / name} of crc32={entry.crc32:08x} as the manifest says, got "
                f"{found:08x}; it is damaged, take another copy"
            )
