"""Copying a saved context from a store to a directory.

The files are gathered in a directory beside the one that they are for, which is renamed when all of
them are there, sound and on the disk. It stays behind when a pull is interrupted, and the next pull
keeps what is sound in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from wavekv.remote.address import store_at
from wavekv.remote.checksum import checked
from wavekv.remote.copied import Copied
from wavekv.remote.failure import DamagedError, RemoteError
from wavekv.remote.folder import FolderStore, sync
from wavekv.remote.published import expect_published, misfits
from wavekv.remote.store import Store
from wavekv.remote.transfer import JOBS, Progress, Transfer
from wavekv.saved.lock import locked
from wavekv.saved.manifest import NAME, Manifest
from wavekv.saved.replace import swap


def pull(
    url: str,
    path: Path,
    *,
    jobs: int = JOBS,
    replace: bool = False,
    progress: Progress | None = None,
) -> Copied:
    """Copy the context at `url` to the new directory `path`; go on where an interrupted pull
    stopped.

    Every file is compared with its size and checksum as it arrives. jobs: files at a time, each
    with up to two chunks of 8 MiB in memory. replace: take the place of a context at `path`, which
    is there whole until then.

    Raises:
        ContextFormatError: there is no context at `url` that this version can read, or `path` is to
            be replaced and is none.
        DamagedError: a file at `url` is missing or damaged. `path` is as it was.
        RemoteError: `path` is there, its folder is not, or the store fails.
        LockedError: another process writes `path`.
    """
    store, path = store_at(url), path.absolute()
    manifest = expect_published(store)
    for problem in misfits(manifest, store.sizes()):
        raise DamagedError(url, problem)
    if not path.parent.is_dir():
        raise RemoteError(f"expected {path.parent} to be a folder, got none; make it first")
    with locked(path):
        _expect_room(path, replace)
        gathered = path.with_name(f".{path.name}.pull")
        _keep_only(gathered, manifest.files)
        copied = _gather(store, manifest, gathered, Transfer(jobs, manifest.nbytes, progress))
        (gathered / NAME).write_bytes(manifest.to_bytes())
        _sync_all(gathered)
        swap(gathered, path)
    return copied


def _expect_room(path: Path, replace: bool) -> None:
    if not os.path.lexists(path):
        return
    if not replace:
        raise RemoteError(
            f"expected nothing at {path}, got something; choose another place, or --replace takes "
            "the place of a context"
        )
    expect_published(FolderStore.at(path))


def _gather(store: Store, manifest: Manifest, gathered: Path, transfer: Transfer) -> Copied:
    """Have all files of a context in a directory."""
    kept = FolderStore.at(gathered)
    absent = {problem.file for problem in misfits(manifest, kept.sizes())}

    def fetch(name: str) -> int | None:
        """The bytes that came; None where the file was there."""
        entry = manifest.files[name]
        if name not in absent and _is_sound(kept, manifest, name):
            transfer.done(entry.nbytes)
            return None
        target = gathered / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            for chunk in checked(store.chunks(name, entry.nbytes), entry, name, store.url):
                file.write(chunk)
                transfer.done(len(chunk))
        return entry.nbytes

    came = [nbytes for nbytes in transfer.run(fetch, manifest.files) if nbytes is not None]
    return Copied(len(came), sum(came), len(manifest.files) - len(came))


def _is_sound(kept: FolderStore, manifest: Manifest, name: str) -> bool:
    entry = manifest.files[name]
    try:
        for _ in checked(kept.chunks(name, entry.nbytes), entry, name, kept.url):
            pass
    except RemoteError:
        return False
    return True


def _keep_only(gathered: Path, names: Iterable[str]) -> None:
    """Have a directory with no other files than these, and no links out of it."""
    if gathered.is_symlink():
        gathered.unlink()
    gathered.mkdir(exist_ok=True)
    wanted = {gathered / name for name in names}
    for folder, folders, files in os.walk(gathered):
        for path in (Path(folder, name) for name in (*folders, *files)):
            if path.is_symlink() or (path.is_file() and path not in wanted):
                path.unlink()


def _sync_all(directory: Path) -> None:
    for folder, _, files in os.walk(directory):
        for name in files:
            sync(Path(folder, name))
        sync(Path(folder))
