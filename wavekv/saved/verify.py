"""All that is wrong with a context: every file read, and everything that does not belong to it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from wavekv.errors import ContextFormatError
from wavekv.kernels.crc32 import crc32_joined, crc32_rows
from wavekv.saved.folder import Folder
from wavekv.saved.manifest import NAME, Manifest
from wavekv.saved.tables import CHECKSUMS, checksum_table, table_file

if TYPE_CHECKING:
    from wavekv.saved.reader import ContextReader

_NUM_THREADS = 4


def problems(
    reader: ContextReader, folder: Folder, progress: Callable[[int], None] | None
) -> list[str]:
    """What is wrong, each with the file and the field."""
    found = list(_damaged(folder, reader.manifest, progress))
    # what damaged files say is not worth a second complaint
    return [*(found or _inconsistent(reader)), *_foreign(folder, reader.manifest)]


def _damaged(
    folder: Folder, manifest: Manifest, progress: Callable[[int], None] | None
) -> Iterator[str]:
    with ThreadPoolExecutor(_NUM_THREADS, "wavekv-verify") as pool:
        checks = [
            (name, entry, pool.submit(folder.check, name, entry))
            for name, entry in manifest.files.items()
        ]
        for name, entry, check in checks:
            try:
                check.result()
            except ContextFormatError as error:
                yield str(error)
            except OSError as error:
                yield f"expected to read {folder.path / name}, got {error}"
            if progress is not None:
                progress(entry.nbytes)


def _inconsistent(reader: ContextReader) -> Iterator[str]:
    """What sound files say that does not fit together."""
    tables = set(reader.tables)
    for name in reader.tables:
        try:
            reader.table(name)
        except ContextFormatError as error:
            yield str(error)
    for name in reader.arrays:
        table = checksum_table(name)
        try:
            if table in tables and list(reader.table(table)) == [CHECKSUMS]:
                yield from _wrong_checksums(reader, name)
            else:
                reader.array(name)
        except ContextFormatError as error:
            yield str(error)


def _wrong_checksums(reader: ContextReader, name: str) -> Iterator[str]:
    """The checksums of pages, joined, are those of their files."""
    pages = reader.pages(name)
    if not pages.files:
        return
    page_bytes = next(iter(pages.files.values())).nbytes // pages.rows_per_file
    padding = crc32_rows(torch.zeros(1, page_bytes, dtype=torch.uint8))
    for index, (file, entry) in enumerate(pages.files.items()):
        crcs = pages.crc32[index * pages.rows_per_file :][: pages.rows_per_file]
        lacking = pages.rows_per_file - len(crcs)
        joined = crc32_joined(torch.cat([crcs, padding.expand(lacking)]), page_bytes)
        if joined != entry.crc32:
            yield (
                f"expected pages of {reader.path / file} with the checksums in column "
                f"{CHECKSUMS} of {table_file(checksum_table(name))}, got others; take another copy"
            )


def _foreign(folder: Folder, manifest: Manifest) -> Iterator[str]:
    """Files, links and folders that the manifest does not name."""
    known = {NAME, *manifest.files}
    folders = {"/".join(name.split("/")[:i]) for name in known for i in range(name.count("/") + 1)}
    for root, names, files, descriptor in os.fwalk(".", dir_fd=folder.descriptor):
        prefix = root.removeprefix(".").removeprefix("/")
        for name in sorted(names + files):
            inside = f"{prefix}/{name}" if prefix else name
            mode = os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode
            is_known = inside in (folders if stat.S_ISDIR(mode) else known)
            if stat.S_ISLNK(mode) or not is_known:
                kind = _kind(mode)
                yield f"expected only files of the manifest in {folder.path}, got {kind} {inside}"


def _kind(mode: int) -> str:
    if stat.S_ISLNK(mode):
        return "a symbolic link"
    return "a folder" if stat.S_ISDIR(mode) else "a file"
