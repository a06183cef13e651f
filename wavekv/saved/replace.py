"""A finished directory takes the place of another, so that a path never names half of one."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import uuid
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}
"""What kernels and file systems without an exchange answer."""


def temporary_path(path: Path) -> Path:
    """A new name beside `path` for what will take its place."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def old_path(path: Path) -> Path:
    """Where what `path` named is for a moment, if the file system cannot exchange names."""
    return path.with_name(f".{path.name}.old")


def swap(temporary: Path, path: Path) -> None:
    """Give the directory `temporary` the name `path`, and remove what had that name.

    Atomic where the file system can exchange two names; elsewhere a crash may leave no `path` but
    the old directory beside it, which `recover` renames back. Only the holder of the lock of `path`
    may call it. On disk when it returns.

    Raises:
        OSError: it cannot be renamed; `path` names what it did.
    """
    if not os.path.lexists(path):
        os.rename(temporary, path)
        sync_directory(path.parent)
    elif _exchange(temporary, path):
        sync_directory(path.parent)
        discard(temporary)
    else:
        _swap_by_two(temporary, path)


def recover(path: Path) -> None:
    """If a crash left the directory of `path` under its second name, rename it back. Only the
    holder of the lock of `path` may call it."""
    if not os.path.lexists(path) and os.path.lexists(old_path(path)):
        os.rename(old_path(path), path)
        sync_directory(path.parent)


def clear(path: Path) -> None:
    """Remove what killed writers of `path` left beside it. Only the holder of the lock may."""
    left = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{32}}\.tmp")
    for name in os.listdir(path.parent):
        if left.fullmatch(name):
            discard(path.with_name(name))
    if os.path.lexists(path):
        _discard_old(path)


def discard(directory: Path) -> None:
    """Remove a directory that nobody names any more. What cannot be removed stays for the next
    writer: what was saved is not less saved for it."""
    shutil.rmtree(directory, ignore_errors=True)


def sync_directory(directory: Path) -> None:
    """Wait until the names in a directory are on disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap_by_two(temporary: Path, path: Path) -> None:
    _discard_old(path)
    os.rename(path, old_path(path))
    try:
        os.rename(temporary, path)
    except BaseException:
        os.rename(old_path(path), path)
        raise
    sync_directory(path.parent)
    _discard_old(path)


def _discard_old(path: Path) -> None:
    """Under a temporary name first: half a directory must never look like one to recover."""
    if os.path.lexists(old_path(path)):
        left = temporary_path(path)
        os.rename(old_path(path), left)
        discard(left)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names at once; False where that is not available."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    names = os.fsencode(first), os.fsencode(second)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error in _NO_EXCHANGE:
        return False
    raise OSError(error, os.strerror(error), str(first), None, str(second))
