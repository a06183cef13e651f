"""Deleting a context from where it is."""

from __future__ import annotations

from dataclasses import dataclass

from wavekv.remote.address import store_at
from wavekv.remote.published import clear, expect_published, foreign, published, unfinished
from wavekv.remote.store import Store
from wavekv.saved.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Removed:
    """What was deleted, and what was not."""

    files: int
    nbytes: int
    foreign: list[str]
    """Names of what was no part of the context. It is still there."""


def remove(place: str) -> Removed:
    """Delete the context at a URL or path, or what is left of one. Its manifest goes first.

    Raises:
        ContextFormatError: it is no saved context. Nothing was deleted.
        RemoteError: the store fails. What is left is no context any more; remove it again.
        LockedError: another process writes to it.
    """
    store = store_at(place)
    _expect(store)  # before the lock, which makes the folder around a folder
    with store.writing():
        manifest = _expect(store)
        sizes = store.sizes()
        clear(store, manifest)
    gone = {name: size for name, size in sizes.items() if name in manifest.files}
    return Removed(len(gone), sum(gone.values()), foreign(manifest, sizes))


def _expect(store: Store) -> Manifest:
    return published(store) or unfinished(store) or expect_published(store)
