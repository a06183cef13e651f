"""`manifest.json`: what a saved context is, and the size and checksum of each of its files.

It is written last and read first. Nothing outside it is ever opened, and no name in it leads out of
the directory.
"""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import dataclass, field
from typing import Any

from wavekv import __version__
from wavekv.errors import ContextFormatError

NAME = "manifest.json"
"""Of the file, in the directory of a context."""
FORMAT = "wavekv-context"
FORMAT_VERSION = 1

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_CRC32 = re.compile(r"[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a context."""

    nbytes: int
    crc32: int
    """Of all its bytes, as `zlib.crc32` computes it."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A parsed manifest."""

    description: dict[str, Any]
    """What the context holds and belongs to; whoever saves contexts says how."""
    files: dict[str, FileEntry]
    """By their names in the directory, with "/" between parts; all files but the manifest."""
    wavekv_version: str = field(default=__version__)
    """That wrote it."""

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(entry.nbytes for entry in self.files.values())

    def to_bytes(self) -> bytes:
        """The file.

        Raises:
            TypeError, ValueError: the description is more than JSON holds.
        """
        body: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "wavekv_version": self.wavekv_version,
            "description": self.description,
            "files": {
                name: {"bytes": entry.nbytes, "crc32": f"{entry.crc32:08x}"}
                for name, entry in self.files.items()
            },
        }
        # as it will be read: keys are text there, and in another order than numbers are
        body = json.loads(json.dumps(body, allow_nan=False))
        body["crc32"] = f"{_checksum(body):08x}"
        return json.dumps(body, indent=1, sort_keys=True).encode() + b"\n"

    @classmethod
    def parse(cls, raw: bytes, where: str) -> Manifest:
        """Read a manifest. where: the place it was read from, for errors.

        Raises:
            ContextFormatError: it is damaged, of a newer version, of something else, or names a
                file outside the directory.
        """
        place = f"{where.rstrip('/')}/{NAME}"
        try:
            body = json.loads(raw, object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise _damaged(place, f"text that is not JSON ({error})") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            found = body.get("format") if isinstance(body, dict) else body
            raise ContextFormatError(
                f"expected {place} to be of a saved context, format={FORMAT!r}, got "
                f"format={found!r}; give the directory that save() wrote"
            )
        version = body.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise ContextFormatError(
                f"expected {place} with format_version={FORMAT_VERSION}, got {version!r}; the "
                f"wavekv that wrote it ({body.get('wavekv_version')!r}) reads it, or prefill and "
                "save the context again"
            )
        told = body.pop("crc32", None)
        if told != f"{_checksum(body):08x}":
            raise _damaged(place, f"crc32={told!r} where its content gives another")
        if not isinstance(body.get("description"), dict):
            raise _damaged(place, "no description")
        return cls(body["description"], _files(body, place), str(body.get("wavekv_version")))


def check_name(name: str, place: str) -> str:
    """`name` if it is that of a file inside a context.

    Raises:
        ContextFormatError: it would lead elsewhere.
    """
    if not all(_PART.fullmatch(part) for part in name.split("/")) or name == NAME:
        raise ContextFormatError(
            f"expected {place} to name files inside the context, in letters, digits, '_', '-' and "
            f"'.', got {name!r} in files; do not use this context"
        )
    return name


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice in one object")
    return found


def _files(body: dict[str, Any], place: str) -> dict[str, FileEntry]:
    files = body.get("files")
    if not isinstance(files, dict):
        raise _damaged(place, "no files")
    entries = {}
    for name, entry in files.items():
        check_name(name, place)
        nbytes = entry.get("bytes") if isinstance(entry, dict) else None
        crc32 = entry.get("crc32") if isinstance(entry, dict) else None
        if type(nbytes) is not int or nbytes < 0:
            raise _damaged(place, f"bytes={nbytes!r} for {name}")
        if not isinstance(crc32, str) or not _CRC32.fullmatch(crc32):
            raise _damaged(place, f"crc32={crc32!r} for {name}")
        entries[name] = FileEntry(nbytes, int(crc32, 16))
    return entries


def _checksum(body: dict[str, Any]) -> int:
    """Of the content, not of how it is laid out."""
    return zlib.crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def _damaged(place: str, found: str) -> ContextFormatError:
    return ContextFormatError(
        f"expected {place} as it was written, got {found}; it is damaged, take another copy"
    )
