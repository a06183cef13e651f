"""One writer of a path at a time, in this process and in others of this machine."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wavekv.errors import LockedError


def lock_path(path: Path) -> Path:
    """The lock file of a path, beside it."""
    return path.with_name(f".{path.name}.lock")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Be the only writer of `path` inside a with block. The lock ends with the process that holds
    it, however that ends, and leaves no file behind unless it is killed.

    Raises:
        LockedError: another writer has it.
        OSError: the folder of `path` is not there or takes no files.
    """
    lock = lock_path(path)
    descriptor = _taken(lock, path)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        # unlinked while it is held: whoever opened the file before sees that its name is gone
        if _names(lock, descriptor):
            lock.unlink()
        os.close(descriptor)


def _taken(lock: Path, path: Path) -> int:
    """A descriptor that holds the lock, of the file that has its name."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _names(lock, descriptor):
                return descriptor
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise LockedError(
                f"expected to be the only writer of {path}, got process {holder or 'unknown'} that "
                f"holds {lock}; wait until it has finished, or write to another path"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _names(lock: Path, descriptor: int) -> bool:
    """Whether the file still has this name: its last holder may have unlinked it."""
    try:
        return os.path.samestat(os.stat(lock, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False
