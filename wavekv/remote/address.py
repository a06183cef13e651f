"""From a URL or a path to the store that it names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from wavekv.errors import ConfigError
from wavekv.remote.folder import FolderStore
from wavekv.remote.store import Store

_OBJECT_STORES = ("s3", "gs", "az")


def store_at(url: str | os.PathLike[str]) -> Store:
    """The store at a URL (`s3://`, `gs://`, `az://`, `memory://`, `file://`) or a path.

    Nothing is read yet. Credentials and endpoints come from the environment.

    Raises:
        ConfigError: no such kind of store, no place in it, or its library is not installed.
    """
    url = os.fspath(url)
    protocol, separator, place = url.partition("://")
    if not separator or protocol == "file":
        return FolderStore.at(Path(place if separator else url))
    if not place.strip("/"):
        raise ConfigError(f"expected a URL with a place in the store, got {url!r}; add its name")
    if protocol in _OBJECT_STORES:
        fs, failures = _object_store(protocol)
        return Store(url, fs, place.strip("/"), failures)
    if protocol == "memory":
        from fsspec.core import url_to_fs

        fs, root = url_to_fs(url)
        return Store(url, fs, root, ())
    known = ", ".join(f"{name}://" for name in (*_OBJECT_STORES, "memory", "file"))
    raise ConfigError(f"expected a path or a URL of {known}, got {url!r}; copy it there first")


def _object_store(protocol: str) -> tuple[Any, tuple[type[Exception], ...]]:
    """A file system over obstore, and its exceptions. It is not registered with fsspec, where it
    would take the place of another library that the program uses for the same URLs."""
    try:
        from obstore.exceptions import BaseError
        from obstore.fsspec import FsspecStore
    except ImportError as error:
        raise ConfigError(
            f"expected obstore to be installed for {protocol}:// URLs, got {error}; "
            "pip install 'wavekv[remote]'"
        ) from error
    # it declares each protocol by itself
    store: Any = FsspecStore
    return store(protocol), (BaseError,)
