"""A folder of this machine as a store."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from wavekv.remote.store import Store
from wavekv.saved.lock import locked


class FolderStore(Store):
    """A folder. Files are written under another name beside their own, and renamed."""

    @classmethod
    def at(cls, path: os.PathLike[str]) -> FolderStore:
        """The folder of that path, which need not be there yet."""
        from fsspec.implementations.local import LocalFileSystem

        return cls(os.fspath(path), LocalFileSystem(), Path(path).absolute().as_posix(), ())

    def sizes(self) -> dict[str, int]:
        """All files, and their bytes."""
        sizes = super().sizes()
        return {name: size for name, size in sizes.items() if not _is_part(Path(name))}

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        """Put a file, on the disk when this returns."""
        path = Path(self._path(name))
        part = path.with_name(f".{path.name}.part")
        rest = iter(chunks)
        first = next(rest)
        with self._told(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.write(first)
                file.writelines(rest)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            sync(path.parent)

    def tidy(self) -> None:
        """Delete parts of files that an interrupted write left, and empty folders."""
        root = Path(self._root)
        with self._told(""):
            for folder, _, names in os.walk(root, topdown=False):
                for name in filter(lambda name: _is_part(Path(name)), names):
                    Path(folder, name).unlink()
                if not os.listdir(folder):
                    Path(folder).rmdir()

    def writing(self) -> AbstractContextManager[None]:
        """Hold the lock of the context."""
        root = Path(self._root)
        with self._told(""):
            root.parent.mkdir(parents=True, exist_ok=True)
        return locked(root)


def sync(path: Path) -> None:
    """Have a file or folder on the disk before what is done next."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_part(path: Path) -> bool:
    # no file of a context is named so: its names begin with a letter, a digit or "_"
    return path.name.startswith(".") and path.name.endswith(".part")
