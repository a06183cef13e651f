"""Size and checksum of a file, compared while its bytes go by."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import NoReturn

from wavekv.remote.failure import DamagedError, Problem
from wavekv.saved.manifest import FileEntry


def checked(chunks: Iterable[bytes], entry: FileEntry, name: str, where: str) -> Iterator[bytes]:
    """The same bytes, the last chunk of them only if all are as the manifest says.

    So whoever writes what comes out here never completes a damaged file: it stays shorter than the
    manifest says, also where the failure itself leaves something behind.

    name, where: the file and its context, for errors.

    Raises:
        DamagedError: size or checksum differ.
    """
    held, nbytes, crc32 = b"", 0, 0
    for chunk in chunks:
        nbytes += len(chunk)
        if nbytes > entry.nbytes:
            _fail(where, name, "bytes", str(entry.nbytes), f"{nbytes} or more")
        crc32 = zlib.crc32(chunk, crc32)
        if held and chunk:
            yield held
        held = chunk or held
    if nbytes != entry.nbytes:
        _fail(where, name, "bytes", str(entry.nbytes), str(nbytes))
    if crc32 != entry.crc32:
        _fail(where, name, "crc32", f"{entry.crc32:08x}", f"{crc32:08x}")
    yield held


def _fail(where: str, name: str, field: str, expected: str, got: str) -> NoReturn:
    raise DamagedError(where, Problem(name, field, expected, got))
