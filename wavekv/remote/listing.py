"""What contexts there are, and what they say of themselves."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from wavekv.errors import ContextFormatError
from wavekv.remote.address import store_at
from wavekv.remote.published import expect_published, published
from wavekv.remote.store import Store
from wavekv.remote.transfer import JOBS
from wavekv.saved.manifest import FORMAT_VERSION, Manifest


@dataclass(frozen=True, slots=True)
class Listed:
    """A context one level below a place."""

    name: str
    manifest: Manifest | None
    """None where it cannot be read."""
    problem: str | None
    """Why it cannot."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"name": self.name, "problem": self.problem, **_totals(self.manifest)}


def contexts(place: str) -> list[Listed]:
    """The contexts one level below a URL or path, in order of names. Reads their manifests.

    Raises:
        RemoteError: the store fails.
    """
    store = store_at(place)
    names = [name for name in store.folders() if not name.startswith(".")]
    with ThreadPoolExecutor(JOBS) as pool:
        found = pool.map(lambda name: _listed(store, name), names)
        return [it for it in found if it is not None]


def info(place: str) -> dict[str, Any]:
    """What the context at a URL or path holds, and how much. Reads its manifest.

    Raises:
        ContextFormatError: there is no context that this version can read.
        RemoteError: the store fails.
    """
    manifest = expect_published(store_at(place))
    return {
        "context": place,
        "wavekv": manifest.wavekv_version,
        **_totals(manifest),
        "description": manifest.description,
    }


def _listed(store: Store, name: str) -> Listed | None:
    try:
        manifest = published(store.below(name))
    except ContextFormatError as error:
        return Listed(name, None, str(error))
    return None if manifest is None else Listed(name, manifest, None)


def _totals(manifest: Manifest | None) -> dict[str, Any]:
    if manifest is None:
        return {}
    return {
        "format_version": FORMAT_VERSION,
        "num_tokens": manifest.description.get("num_tokens"),
        "files": len(manifest.files),
        "nbytes": manifest.nbytes,
    }
