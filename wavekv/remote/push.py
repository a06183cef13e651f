"""Copying a saved context to a store.

Files keep their names, so that a context in a store is the same Zarr group as on a disk. What is
there already can then not be told from its name, and its size alone proves nothing: contexts of one
model have many files of equal names and sizes. So a copy first puts its manifest under another name
(`MARKER`), and does that only while none of the files is there. A file that is there beside a
marker of the same manifest was therefore written by a copy of this context, and as objects appear
whole or too short, one of the right size is finished: it is not sent again. The manifest itself is
put last, so no reader finds a context before all of it is there; then the marker goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from wavekv.remote.address import store_at
from wavekv.remote.checksum import checked
from wavekv.remote.copied import Copied
from wavekv.remote.failure import DamagedError
from wavekv.remote.folder import FolderStore
from wavekv.remote.published import (
    MARKER,
    clear,
    expect_published,
    misfits,
    occupied,
    published,
    unfinished,
)
from wavekv.remote.store import Store
from wavekv.remote.transfer import JOBS, Progress, Transfer
from wavekv.saved.manifest import NAME, Manifest


def push(
    path: Path,
    url: str,
    *,
    jobs: int = JOBS,
    replace: bool = False,
    progress: Progress | None = None,
) -> Copied:
    """Copy the context in the directory `path` to `url`; go on where an interrupted push stopped.

    Every file is compared with its checksum as it is read. One that is damaged stops the push, and
    nothing is published. jobs: files at a time, each with up to two chunks of 8 MiB in memory.
    replace: delete another context at `url` first.

    Raises:
        ContextFormatError: `path` is no saved context, or `url` holds something like one that this
            version cannot read.
        DamagedError: a file in `path` is not as its manifest says.
        RemoteError: `url` holds something else, or the store fails.
        LockedError: another process writes to `url`, a folder.
    """
    source, target = FolderStore.at(path), store_at(url)
    manifest = expect_published(source)
    for problem in misfits(manifest, source.sizes()):
        raise DamagedError(source.url, problem)
    transfer = Transfer(jobs, manifest.nbytes, progress)
    with target.writing():
        is_published = _prepare(target, manifest, replace)
        wrong = [problem.file for problem in misfits(manifest, target.sizes())]
        copied = Copied(
            len(wrong),
            sum(manifest.files[name].nbytes for name in wrong),
            len(manifest.files) - len(wrong),
        )
        transfer.done(manifest.nbytes - copied.nbytes)
        transfer.run(
            lambda name: target.write(name, _sent(name, source, manifest, transfer)), wrong
        )
        if not is_published:
            target.write(NAME, [manifest.to_bytes()])
        target.delete(MARKER)
    return copied


def _sent(name: str, source: Store, manifest: Manifest, transfer: Transfer) -> Iterator[bytes]:
    """The chunks of a file, counted once they are sent."""
    entry = manifest.files[name]
    for chunk in checked(source.chunks(name, entry.nbytes), entry, name, source.url):
        yield chunk
        transfer.done(len(chunk))


def _prepare(target: Store, manifest: Manifest, replace: bool) -> bool:
    """Have at the place the files of this context alone, if any; return whether it is published."""
    there = published(target)
    if there == manifest:
        return True
    rest = unfinished(target)
    if there is None and rest == manifest:
        return False
    _make_room(target, there or rest, replace)
    for name in sorted(set(target.sizes()) & set(manifest.files)):
        target.delete(name)
    target.write(MARKER, [manifest.to_bytes()])
    return False


def _make_room(target: Store, there: Manifest | None, replace: bool) -> None:
    if there is None:
        for name in sorted(target.sizes())[:1]:
            raise occupied(target, f"{name} and no saved context", "choose another place")
    elif not replace:
        raise occupied(
            target, "another context", "choose another place, or --replace deletes that one first"
        )
    else:
        clear(target, there)
