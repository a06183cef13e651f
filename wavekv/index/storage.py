"""An index in a file: a preamble, parts at aligned offsets, and a header that describes them.

    magic (8 bytes), format version, header offset, header length, header checksum (see _PREAMBLE)
    parts, each at a multiple of 4096 bytes, zeros between them
    header: JSON, with the name, type, shape, offset, length and CRC-32 of each part

The header comes last, since it holds the checksums of what was written before it, and the preamble
is filled in at the end. Everything goes to a temporary file that then takes the place of the old.
"""

from __future__ import annotations

import json
import math
import mmap as memory_map
import os
import struct
import uuid
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from wavekv import __version__
from wavekv.errors import IndexFormatError, InputError
from wavekv.index.params import IndexParams
from wavekv.index.state import Expected, IndexState

FORMAT_VERSION = 4
_MAGIC = b"WAVEKVIX"
_PREAMBLE = struct.Struct("<8sIQQI")
_ALIGNMENT = 4096
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int32,
        torch.int8,
        torch.uint8,
    )
}


def save(state: IndexState, path: str | Path) -> None:
    """Write an index; see `WaveIndex.save`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            _write(file, state)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def describe(path: str | Path) -> dict[str, Any]:
    """The header of a saved index."""
    with Path(path).open("rb") as file:
        return _read_header(file, path)


def load(path: str | Path, *, mmap: bool, device: torch.device, verify: bool) -> IndexState:
    """Read an index; see `WaveIndex.load`."""
    if mmap and device.type != "cpu":
        raise InputError(f"a mapped index lives on the CPU, got device={str(device)!r}")
    with Path(path).open("rb") as file:
        header = _read_header(file, path)
        try:
            state, expected = _empty_state(header)
            parts = {part["name"]: part for part in header["parts"]}
            if {n: (_DTYPES[p["dtype"]], p["shape"]) for n, p in parts.items()} != expected:
                raise ValueError("the parts are not those of such an index")
            for part in parts.values():
                _expect_inside(part, header["end"])
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise _damaged(path, f"a header that does not fit itself ({error!r})") from error
        whole = memory_map.mmap(file.fileno(), 0, access=memory_map.ACCESS_COPY) if mmap else None
        tensors = {
            name: _read_part(file, whole, part, path, verify).to(device)
            for name, part in parts.items()
        }
    state.restore(tensors)
    return state


def _write(file: BinaryIO, state: IndexState) -> None:
    file.write(bytes(_ALIGNMENT))
    parts = []
    for name, tensor in state.tensors().items():
        raw = _bytes_of(tensor.cpu().contiguous().view(-1).view(torch.uint8))
        offset = file.tell()
        file.write(raw)
        file.write(bytes(-len(raw) % _ALIGNMENT))
        parts.append(
            {
                "name": name,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "offset": offset,
                "nbytes": len(raw),
                "crc32": zlib.crc32(raw),
            }
        )
    header = {
        "wavekv": __version__,
        "params": state.params.to_dict(),
        "num_heads": state.tail.shape[0],
        "dim": state.tail.shape[3],
        "ntotal": state.num_keys,
        "dtype": str(state.tail.dtype).removeprefix("torch."),
        "is_flat": state.is_flat,
        "has_values": state.has_values,
        "has_query_sample": state.metric is not None,
        "code_dims": state.code_dims,
        "parts": parts,
    }
    text = json.dumps(header, sort_keys=True).encode()
    at = file.tell()
    file.write(text)
    file.seek(0)
    checksum = zlib.crc32(text)
    file.write(_PREAMBLE.pack(_MAGIC, FORMAT_VERSION, at, len(text), checksum))


def _read_header(file: BinaryIO, path: str | Path) -> dict[str, Any]:
    preamble = file.read(_PREAMBLE.size)
    if preamble[:8] != _MAGIC or len(preamble) < _PREAMBLE.size:
        raise IndexFormatError(
            f"expected {path} to be a wavekv index, which begins with {_MAGIC!r}, "
            f"got {preamble[:8]!r}"
        )
    _, version, offset, length, checksum = _PREAMBLE.unpack(preamble)
    if version != FORMAT_VERSION:
        raise IndexFormatError(
            f"expected {path} in format version {FORMAT_VERSION}, got {version}; "
            "the wavekv that wrote it reads it, or rebuild the index with this one"
        )
    size = os.fstat(file.fileno()).st_size
    if offset + length != size:
        raise _damaged(path, f"{size} bytes where {offset + length} were written")
    file.seek(offset)
    text = file.read(length)
    if zlib.crc32(text) != checksum:
        raise _damaged(path, f"a header whose checksum is not {checksum:#010x}")
    try:
        header = {"format_version": version, **json.loads(text), "end": offset}
    except (TypeError, ValueError) as error:
        raise _damaged(path, f"a header that is none ({error!r})") from error
    return header


def _empty_state(header: dict[str, Any]) -> tuple[IndexState, Expected]:
    """An index without keys, and the type and shape that each of its parts in the file has."""
    H, D, dtype = header["num_heads"], header["dim"], _DTYPES[header["dtype"]]
    metric = torch.eye(D).expand(H, D, D) if header["has_query_sample"] else None
    state = IndexState(
        torch.empty(H, 0, D, dtype=dtype),
        IndexParams(**header["params"]),
        is_flat=header["is_flat"],
        has_values=header["has_values"],
        metric=metric,
    )
    return state, state.expected_parts(header["ntotal"], header["code_dims"])


def _expect_inside(part: dict[str, Any], end: int) -> None:
    """A part has the bytes of its type and shape, between the preamble and the header."""
    size = math.prod(part["shape"]) * _DTYPES[part["dtype"]].itemsize
    first = part["offset"]
    if part["nbytes"] != size or not _ALIGNMENT <= first <= first + size <= end:
        raise ValueError(f"part {part['name']!r} has {part['nbytes']} bytes at {first}")


def _read_part(
    file: BinaryIO,
    whole: memory_map.mmap | None,
    part: dict[str, Any],
    path: str | Path,
    verify: bool,
) -> Tensor:
    dtype, offset, nbytes = _DTYPES[part["dtype"]], part["offset"], part["nbytes"]
    if whole is not None and nbytes:
        raw = torch.frombuffer(whole, dtype=torch.uint8, count=nbytes, offset=offset)
    else:
        raw = torch.empty(nbytes, dtype=torch.uint8)
        file.seek(offset)
        if file.readinto(_bytes_of(raw)) != nbytes:  # type: ignore[attr-defined]
            raise _damaged(path, f"a part {part['name']!r} that is cut short")
    if verify and zlib.crc32(_bytes_of(raw)) != part["crc32"]:
        raise _damaged(path, f"a part {part['name']!r} at byte {offset} whose checksum is another")
    return raw.view(dtype).view(part["shape"])


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a tensor [nbytes] uint8 on the CPU."""
    array: Any = tensor.numpy()
    return memoryview(array)


def _sync_folder(folder: Path) -> None:
    # the file is in place; that its name lasts through a power cut is asked of folders that can
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _damaged(path: str | Path, found: str) -> IndexFormatError:
    return IndexFormatError(
        f"expected {path} as it was saved, got {found}; it is damaged, restore or rebuild it"
    )
