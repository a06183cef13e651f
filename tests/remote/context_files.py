"""Small saved contexts, made by hand, and what the tests do to them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wavekv.remote.failure import RemoteError
from wavekv.remote.folder import FolderStore
from wavekv.remote.published import MARKER
from wavekv.remote.store import Store
from wavekv.saved.manifest import NAME, FileEntry, Manifest

CHUNK = 1000
"""Of stores in these tests, so that small files have many."""
SIZES = {
    "zarr.json": 70,
    "keys/c/0": 5 * CHUNK + 1,
    "keys/c/1": CHUNK,
    "keys/zarr.json": CHUNK - 1,
    "tokens.arrow": 2 * CHUNK,
    "empty": 0,
}


def make_context(path: Path, seed: int, sizes: dict[str, int] = SIZES) -> Manifest:
    """Save a context. Two of other seeds have files of equal names and sizes."""
    rng = np.random.default_rng(seed)
    files = {}
    for name, size in sizes.items():
        content = rng.bytes(size)
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
        files[name] = FileEntry(size, zlib.crc32(content))
    manifest = Manifest({"num_tokens": 100 + seed, "model": "tiny"}, files)
    (path / NAME).write_bytes(manifest.to_bytes())
    return manifest


def tree(path: Path) -> dict[str, bytes]:
    """All files below a folder."""
    files = (file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def at_place(store: Store) -> dict[str, bytes | None]:
    """All objects at a place."""
    return {name: store.read(name) for name in store.sizes()}


def count_writes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files of contexts that are written to stores from now on."""
    written: list[str] = []

    def count(name: str) -> None:
        if name not in (NAME, MARKER):
            written.append(name)

    before_each(monkeypatch, "write", count)
    return written


def fail_after(monkeypatch: pytest.MonkeyPatch, method: str, times: int) -> None:
    """Have a method of stores fail from its call number `times` on, counted from 0."""
    left = iter(range(times))

    def fail(name: str) -> None:
        if next(left, None) is None:
            raise RemoteError(f"the network is gone, {name} too")

    before_each(monkeypatch, method, fail)


def before_each(monkeypatch: pytest.MonkeyPatch, method: str, do: Callable[[str], None]) -> None:
    """Call `do` with the name before each call of a method of stores that takes one."""
    for kind in (Store, FolderStore):
        if method in vars(kind):
            monkeypatch.setattr(kind, method, _preceded(vars(kind)[method], do))


def _preceded(original: Callable[..., Any], do: Callable[[str], None]) -> Callable[..., Any]:
    def both(self: Store, name: str, *others: Any) -> Any:
        do(name)
        return original(self, name, *others)

    return both
