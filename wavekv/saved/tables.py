"""Tables as Arrow IPC files of one record batch: columns that share their first dimension."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wavekv.errors import ContextFormatError, LayoutError
from wavekv.saved.dtypes import DTYPES, bytes_of, expect_bools, host_copy, name_of

if TYPE_CHECKING:
    import pyarrow

FOLDER = "tables"
CHECKSUMS = "crc32"
"""The column of checksums of pages."""
_STORED_AS = {"bfloat16": "uint16", "bool": "uint8"}
_ARROW_NAMES = {"float": "float32", "halffloat": "float16"}
"""Names of Arrow's types that are not those of the same type elsewhere."""


def table_file(name: str) -> str:
    """The file of a table."""
    return f"{FOLDER}/{name}.arrow"


def checksum_table(array: str) -> str:
    """The table of the checksums of an array of pages."""
    return array.replace("/", "_")


def to_arrow(columns: Mapping[str, Tensor], place: str) -> pyarrow.Buffer:
    """The file of columns [n, ...]. place: its name, for errors.

    Raises:
        LayoutError: there are no columns, of no common length, or with an inner dimension of 0.
    """
    import pyarrow

    lengths = {column.shape[0] if column.dim() else -1 for column in columns.values()}
    if len(lengths) != 1 or -1 in lengths:
        shapes = {name: tuple(column.shape) for name, column in columns.items()}
        raise LayoutError(f"expected columns of {place} that share their length, got {shapes}")
    stored = [_column(name, column, place) for name, column in columns.items()]
    schema = pyarrow.schema([field for field, _ in stored])
    batch = pyarrow.record_batch([array for _, array in stored], schema=schema)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def from_arrow(mapped: mmap.mmap, place: str) -> dict[str, Tensor]:
    """The columns of a mapped file, as views of it. place: its path, for errors.

    Raises:
        ContextFormatError: it is not as `to_arrow` writes it.
    """
    import pyarrow

    try:
        with pyarrow.ipc.open_file(pyarrow.py_buffer(mapped)) as reader:
            if reader.num_record_batches != 1:
                raise ValueError(f"{reader.num_record_batches} record batches where 1 is expected")
            batch = reader.get_batch(0)
        return {
            field.name: _view(mapped, field, array, f"column {field.name} of {place}")
            for field, array in zip(batch.schema, batch.columns, strict=True)
        }
    except ContextFormatError:
        raise
    except (pyarrow.ArrowException, ValueError, RecursionError) as error:
        raise ContextFormatError(
            f"expected {place} as save() writes it, an Arrow file of one uncompressed batch, got "
            f"{error}; take another copy of the context"
        ) from error


def _column(name: str, column: Tensor, place: str) -> tuple[pyarrow.Field, pyarrow.Array]:
    import pyarrow

    dtype = name_of(column.dtype, f"column {name} of {place}")
    stored = _STORED_AS.get(dtype, dtype)
    inner, metadata = list(column.shape[1:]), {}
    if 0 in inner:
        raise LayoutError(
            f"expected column {name} of {place} with inner dimensions > 0, got {inner}"
        )
    buffer = pyarrow.py_buffer(bytes_of(host_copy(column)).numpy())
    kind = getattr(pyarrow, stored)()
    array = pyarrow.Array.from_buffers(kind, column.numel(), [None, buffer])
    if inner:
        metadata["shape"] = json.dumps(inner)
        kind = pyarrow.list_(pyarrow.field("item", kind, nullable=False), math.prod(inner))
        array = pyarrow.Array.from_buffers(kind, len(column), [None], children=[array])
    if stored != dtype:
        metadata["dtype"] = dtype
    return pyarrow.field(name, kind, nullable=False, metadata=metadata or None), array


def _view(mapped: mmap.mmap, field: pyarrow.Field, array: pyarrow.Array, where: str) -> Tensor:
    """The column as a view of the mapped file; a ValueError if it is not of the form."""
    metadata = {key.decode(): value.decode() for key, value in (field.metadata or {}).items()}
    rows, inner = len(array), list[int]()
    if "shape" in metadata:
        inner = json.loads(metadata["shape"])
        if not _is_inner(inner) or not hasattr(field.type, "list_size"):
            raise ValueError(f"shape={metadata['shape']!r} in {where}")
        if field.type.list_size != math.prod(inner):
            raise ValueError(f"lists of {field.type.list_size} for shape={inner} in {where}")
        array = _expect_whole(array, where).values
    array = _expect_whole(array, where)
    kind = str(array.type)
    dtype = metadata.get("dtype", _ARROW_NAMES.get(kind, kind))
    if dtype not in DTYPES or _STORED_AS.get(dtype, dtype) != _ARROW_NAMES.get(kind, kind):
        raise ValueError(f"type {kind} with dtype={metadata.get('dtype')!r} in {where}")
    if not rows:
        return torch.empty(0, *inner, dtype=DTYPES[dtype])
    count, size = rows * math.prod(inner), DTYPES[dtype].itemsize
    base = torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()
    data = array.buffers()[1]
    start = -1 if data is None else data.address - base
    # numbers that are not in the file were unpacked to somewhere else
    if not 0 <= start <= len(mapped) - count * size or start % size:
        raise ValueError(f"compressed or unaligned numbers in {where}")
    flat = torch.frombuffer(mapped, dtype=DTYPES[dtype], count=count, offset=start)
    return expect_bools(flat.view(-1, *inner), where)


def _expect_whole(array: pyarrow.Array, where: str) -> Any:
    if array.offset or array.null_count:
        raise ValueError(f"{array.null_count} nulls, offset={array.offset} in {where}")
    return array


def _is_inner(inner: Any) -> bool:
    return (
        isinstance(inner, list)
        and len(inner) > 0
        and all(type(size) is int and size > 0 for size in inner)
    )
