"""The lock of whoever writes a saved context."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wavekv.errors import LockedError


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Be the only writer of the context at `path`, by a file beside it.

    Raises:
        LockedError: another has it.
    """
    place = path.parent / f".{path.name}.lock"
    with place.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LockedError(
                f"expected to be the only one that writes {path}, got {place} locked by another; "
                "wait for it, or write elsewhere"
            ) from error
        yield
