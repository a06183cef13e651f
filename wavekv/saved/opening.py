"""Finding the directory of a context, while another context may be taking its place."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from wavekv.errors import ContextFormatError, LockedError
from wavekv.saved.folder import Folder
from wavekv.saved.lock import locked
from wavekv.saved.manifest import NAME
from wavekv.saved.replace import old_path, recover


def with_manifest(path: Path) -> tuple[Folder, bytes]:
    """The directory and the content of its manifest.

    Raises:
        FileNotFoundError: nothing is there.
        ContextFormatError: it is a file, or has no manifest.
        OSError: it cannot be read.
    """
    _recover(path)
    try:
        return _opened(path)
    except FileNotFoundError:
        # between directory and manifest another context took its place; and where a file system
        # cannot exchange names, none is there for a moment
        try:
            return _opened(path)
        except FileNotFoundError as error:
            raise _missing(path) from error


def _recover(path: Path) -> None:
    """What a crash in the middle of a replacement left is renamed back, unless a writer is there
    to do it."""
    if not os.path.lexists(path) and os.path.lexists(old_path(path)):
        with suppress(LockedError, OSError), locked(path):
            recover(path)


def _opened(path: Path) -> tuple[Folder, bytes]:
    try:
        folder = Folder(path)
    except NotADirectoryError:
        raise ContextFormatError(
            f"expected {path} to be a saved context, got a file; give the directory it is in"
        ) from None
    try:
        return folder, folder.read(NAME)
    except BaseException as error:
        folder.close()
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            raise ContextFormatError(
                f"expected {path / NAME} to be a file, got a symbolic link; take another copy"
            ) from error
        raise


def _missing(path: Path) -> Exception:
    if path.is_dir():
        return ContextFormatError(
            f"expected {path / NAME} of a saved context, got a directory without it; give the "
            "directory that save() wrote"
        )
    return FileNotFoundError(
        f"expected a saved context at {path}, got nothing there; give the path that it was saved to"
    )
