"""What is at a place: a context, what is left of one, something else, or nothing."""

from __future__ import annotations

from wavekv.errors import ContextFormatError
from wavekv.remote.failure import Problem, RemoteError
from wavekv.remote.store import Store
from wavekv.saved.manifest import NAME, Manifest

MARKER = f".{NAME}.partial"
"""Of the object that holds the manifest of a context while it is copied to its place, or deleted
there. No file of a context can have this name."""


def published(store: Store) -> Manifest | None:
    """The manifest of the context at a place; None where there is none.

    Raises:
        ContextFormatError: it is damaged, of a newer version, or of something else.
    """
    return _parsed(store, NAME)


def unfinished(store: Store) -> Manifest | None:
    """The manifest of the context that is being written to or deleted from a place, or was when
    that was interrupted; None where there is none.

    Raises:
        ContextFormatError: it is damaged or of a newer version.
    """
    return _parsed(store, MARKER)


def expect_published(store: Store) -> Manifest:
    """The manifest of the context at a place.

    Raises:
        ContextFormatError: there is none, or it is damaged, newer or of something else.
    """
    manifest = published(store)
    if manifest is not None:
        return manifest
    if unfinished(store) is not None:
        raise ContextFormatError(
            f"expected a saved context at {store.url}, got an unfinished push or rm of one; run "
            "that again first"
        )
    raise ContextFormatError(
        f"expected a saved context at {store.url}, got no {NAME} there; check the place, "
        "`wavekv context ls` lists the contexts one level below another"
    )


def misfits(manifest: Manifest, sizes: dict[str, int]) -> list[Problem]:
    """The files of a context that are missing or of another size, in order."""
    problems = []
    for name, entry in sorted(manifest.files.items()):
        got = sizes.get(name)
        if got is None:
            problems.append(Problem(name, "file", "present", "missing"))
        elif got != entry.nbytes:
            problems.append(Problem(name, "bytes", str(entry.nbytes), str(got)))
    return problems


def foreign(manifest: Manifest, sizes: dict[str, int]) -> list[str]:
    """What is at the place of a context and is no part of it, in order."""
    return sorted(set(sizes) - set(manifest.files) - {NAME, MARKER})


def clear(store: Store, manifest: Manifest) -> None:
    """Delete a context, so that no reader sees a part of it and a second call finishes a first that
    was interrupted. Files that it does not name stay."""
    store.write(MARKER, [manifest.to_bytes()])
    store.delete(NAME)
    for name in sorted(set(store.sizes()) & set(manifest.files)):
        store.delete(name)
    store.delete(MARKER)
    store.tidy()


def occupied(store: Store, found: str, do: str) -> RemoteError:
    """The error of a place that holds something else."""
    return RemoteError(f"expected nothing at {store.url}, got {found}; {do}")


def _parsed(store: Store, name: str) -> Manifest | None:
    raw = store.read(name)
    return None if raw is None else Manifest.parse(raw, store.url)
