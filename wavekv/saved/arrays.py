"""Arrays as Zarr version 3 has them: `zarr.json`, and chunk files of plain bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from wavekv.errors import ContextFormatError
from wavekv.saved.dtypes import DTYPES, name_of

METADATA = "zarr.json"
"""The name of the file that describes a group or an array."""
_STORED_AS = {"bfloat16": "uint16"}
_FILL: dict[str, Any] = {"float32": 0.0, "float16": 0.0, "bool": False}

_MOST_FILE_BYTES = 64 << 20
_LEAST_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ArrayForm:
    """What the metadata of an array says."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows_per_file: int
    """Of its first dimension in a chunk; the other dimensions are whole."""

    @property
    def num_files(self) -> int:
        """Chunk files; none if the array is empty."""
        return 0 if 0 in self.shape else -(-self.shape[0] // self.rows_per_file)

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Of a chunk; the last one is as large as the others."""
        return (self.rows_per_file, *self.shape[1:])

    @property
    def file_bytes(self) -> int:
        """Of a chunk file."""
        count = self.dtype.itemsize
        for size in self.file_shape:
            count *= size
        return count

    def file_name(self, array: str, index: int) -> str:
        """Of a chunk of the array with that name."""
        return "/".join([array, "c", str(index), *["0"] * (len(self.shape) - 1)])

    def to_bytes(self) -> bytes:
        """The file `zarr.json`."""
        return _file(self._body())

    @classmethod
    def parse(cls, raw: bytes, place: str) -> ArrayForm:
        """Read a `zarr.json`. place: its path, for errors.

        Raises:
            ContextFormatError: it says anything else than `to_bytes` writes.
        """
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise _unlike(place, "content", "JSON", str(error)) from error
        if not isinstance(body, dict):
            raise _unlike(place, "content", "an object", body)
        form = cls(_shape(body, place), _dtype(body, place), _rows(body, place))
        expected = form._body()
        for key in expected.keys() | body.keys():
            if expected.get(key, "nothing") != body.get(key, "nothing"):
                raise _unlike(place, key, expected.get(key, "nothing"), body.get(key, "nothing"))
        return form

    def _body(self) -> dict[str, Any]:
        name = name_of(self.dtype, "the array")
        stored = _STORED_AS.get(name, name)
        # a chunk has no dimension of 0, though the array may
        grid = [max(size, 1) for size in self.file_shape]
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": stored,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": grid}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "fill_value": _FILL.get(stored, 0),
            "attributes": {} if stored == name else {"dtype": name},
        }


def group_bytes() -> bytes:
    """The `zarr.json` of a group."""
    return _file({"zarr_format": 3, "node_type": "group", "attributes": {}})


def rows_per_file(num_rows: int, row_bytes: int) -> int:
    """Rows in a file of an array of so many: a power of two, 64 MiB at most where a row is not
    larger, and little enough that what pads the last file is below 1/64 of the array, or 1 MiB."""
    limit = min(max(num_rows * row_bytes // 64, _LEAST_FILE_BYTES), _MOST_FILE_BYTES)
    rows = 1
    while 2 * rows * row_bytes <= limit and rows < num_rows:
        rows *= 2
    return rows


def _file(body: dict[str, Any]) -> bytes:
    return json.dumps(body, indent=1).encode() + b"\n"


def _shape(body: dict[str, Any], place: str) -> tuple[int, ...]:
    shape = body.get("shape")
    if not _is_shape(shape, 0):
        raise _unlike(place, "shape", "a list of sizes", shape)
    return tuple(body["shape"])


def _dtype(body: dict[str, Any], place: str) -> torch.dtype:
    attributes = body.get("attributes")
    name = attributes.get("dtype") if isinstance(attributes, dict) else None
    name = body.get("data_type") if name is None else name
    if not isinstance(name, str) or name not in DTYPES:
        raise _unlike(place, "data_type", f"one of {', '.join(DTYPES)}", name)
    return DTYPES[name]


def _rows(body: dict[str, Any], place: str) -> int:
    try:
        grid = body["chunk_grid"]["configuration"]["chunk_shape"]
    except (KeyError, TypeError):
        grid = None
    if not _is_shape(grid, 1):
        raise _unlike(place, "chunk_grid", "a regular one", body.get("chunk_grid"))
    return int(grid[0])


def _is_shape(sizes: Any, least: int) -> bool:
    return (
        isinstance(sizes, list)
        and len(sizes) > 0
        and all(type(size) is int and least <= size < 1 << 62 for size in sizes)
    )


def _unlike(place: str, key: str, expected: Any, found: Any) -> ContextFormatError:
    return ContextFormatError(
        f"expected {place} with {key}={expected!r}, got {found!r}; it is not as save() writes it, "
        "take another copy of the context"
    )
