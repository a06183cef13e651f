"""A place in an object store, as the copying of contexts sees it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from wavekv.remote.failure import RemoteError

CHUNK = 8 << 20
"""Bytes in memory for each file in work."""


class Store:
    """What is below a URL. Names are relative to it, with "/" between parts.

    An object that is written appears whole or not at all, or shorter than it was to be. Safe to use
    from threads. All methods raise RemoteError where the store refuses or cannot be reached.
    """

    def __init__(self, url: str, fs: Any, root: str, failures: tuple[type[Exception], ...]) -> None:
        """fs: a file system of fsspec; root: the place in it; failures: what it raises."""
        self.url = url
        self._fs = fs
        self._root = root
        self._failures: tuple[type[Exception], ...] = (OSError, *failures)

    def below(self, name: str) -> Store:
        """The place of that name in this one."""
        return type(self)(
            f"{self.url.rstrip('/')}/{name}", self._fs, self._path(name), self._failures
        )

    def sizes(self) -> dict[str, int]:
        """All objects, and their bytes. One request for every thousand of a folder."""
        with self._told(""):
            found = self._fs.find(self._root, detail=True)
        return {path[len(self._root) :].lstrip("/"): it["size"] for path, it in found.items()}

    def folders(self) -> list[str]:
        """Names one level below that have objects below them, in order."""
        with self._told(""):
            try:
                found = self._fs.ls(self._root, detail=True)
            except FileNotFoundError:
                return []
        names = [it["name"].rstrip("/") for it in found if it["type"] == "directory"]
        return sorted(name.rsplit("/", 1)[-1] for name in names)

    def read(self, name: str) -> bytes | None:
        """A small object; None where there is none."""
        with self._told(name):
            try:
                raw: bytes = self._fs.cat_file(self._path(name))
            except FileNotFoundError:
                return None
        return raw

    def chunks(self, name: str, nbytes: int) -> Iterator[bytes]:
        """The first `nbytes` of an object, CHUNK bytes a request."""
        for start in range(0, nbytes, CHUNK):
            with self._told(name):
                chunk: bytes = self._fs.cat_file(
                    self._path(name), start=start, end=min(start + CHUNK, nbytes)
                )
            yield chunk

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        """Put an object. Nothing is written where the first chunk fails to come."""
        rest = iter(chunks)
        first = next(rest)
        with self._told(name), self._fs.open(self._path(name), "wb") as file:
            file.write(first)
            for chunk in rest:
                file.write(chunk)

    def delete(self, name: str) -> None:
        """Delete an object, if it is there."""
        with self._told(name):
            try:
                self._fs.rm_file(self._path(name))
            except FileNotFoundError:
                return

    def tidy(self) -> None:
        """Delete what is left of objects that are gone."""

    def writing(self) -> AbstractContextManager[None]:
        """Keep other writers out, where the store can."""
        return nullcontext()

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        try:
            yield
        except RemoteError:
            raise
        except self._failures as error:
            raise RemoteError(
                f"expected to reach {self.url.rstrip('/')}/{name}, got {_brief(error)}; check the "
                "URL, the credentials and the network"
            ) from error


def _brief(error: Exception) -> str:
    """An error in one line, without what obstore adds for those who debug it."""
    text = str(error).partition("\n\nDebug source:")[0]
    return f"{type(error).__name__}: {' '.join(text.split())}"
