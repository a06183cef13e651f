"""Arrays in files: NumPy's own formats, and Arrow and Parquet where pyarrow is installed.

A source is a path, or `path:name` to pick one array of an `.npz` or one column of a table.
"""

from __future__ import annotations

import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wavekv.errors import InputError

NUMPY, ARROW, PARQUET = (".npy", ".npz"), (".arrow", ".feather"), (".parquet",)
WRITABLE = (".npz", *ARROW)
_HOLDS_NAMES = (".npz", *ARROW, *PARQUET)

Array = NDArray[Any]


def read_vectors(source: str) -> Array:
    """Vectors [N, D] or [H, N, D] of a source; those of an `.npy` stay in the file until used.

    A column of a table has to be a FixedSizeList of float32 or float16; it gives [N, D].

    Raises:
        InputError: not such a file, no such name, or not vectors.
        ConfigError: pyarrow is needed and missing.
        OSError: it cannot be read.
    """
    path, name = _split(source)
    if path.suffix in NUMPY:
        array = _read_numpy(path, name)
    elif path.suffix in _HOLDS_NAMES:
        array = _read_column(path, name)
    else:
        raise InputError(
            f"expected a file that ends in one of {', '.join((*NUMPY, *ARROW, *PARQUET))}, "
            f"got {source}"
        )
    if array.ndim not in (2, 3):
        raise InputError(f"expected {source} to hold [N, D] or [H, N, D], got {array.shape}")
    return array


def expect_writable(path: Path) -> None:
    """An ending that `write_found` knows, and a folder that exists.

    Raises:
        InputError, OSError, ConfigError: there is none, or pyarrow is needed and missing.
    """
    if path.suffix not in WRITABLE:
        raise InputError(
            f"expected an output that ends in one of {', '.join(WRITABLE)}, got {path}"
        )
    expect_folder(path)


def expect_folder(path: Path) -> None:
    """The folder that a file is to be written to exists."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"expected a folder to write {path.name} to, got {path.parent}")


def write_found(path: Path, ids: Array, scores: Array) -> None:
    """Write ids and scores [Q, k] or [H, Q, k].

    An `.npz` holds both arrays as they are. A table has a row for each query, with columns `head`,
    `query`, `ids` and `scores`, the latter two of lists of size k.
    """
    if path.suffix == ".npz":
        np.savez(path, ids=ids, scores=scores)
        return
    # here: the commands that read no such file start faster without it
    import pyarrow as arrow

    Q, k = ids.shape[-2:]
    heads = ids.size // (Q * k) if Q else 0
    columns = {
        "head": np.repeat(np.arange(heads, dtype=np.int32), Q),
        "query": np.tile(np.arange(Q, dtype=np.int32), heads),
        "ids": arrow.FixedSizeListArray.from_arrays(arrow.array(ids.reshape(-1)), k),
        "scores": arrow.FixedSizeListArray.from_arrays(arrow.array(scores.reshape(-1)), k),
    }
    table = arrow.table(columns)
    with arrow.OSFile(str(path), "wb") as sink, arrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _split(source: str) -> tuple[Path, str | None]:
    """The path and the name in `path:name`."""
    path, colon, name = source.rpartition(":")
    if colon and Path(path).suffix in _HOLDS_NAMES and not Path(source).exists():
        return Path(path), name
    return Path(source), None


def _read_numpy(path: Path, name: str | None) -> Array:
    magic = b"\x93NUMPY" if path.suffix == ".npy" else b"PK"
    with path.open("rb") as file:
        begin = file.read(len(magic))
    if begin != magic:
        raise InputError(f"expected {path} to begin with {magic!r}, got {begin!r}")
    try:
        if path.suffix == ".npy":
            return np.lib.format.open_memmap(path, mode="r")
        # a file of ours: NumPy leaves its own open if it is no archive
        with path.open("rb") as file, np.load(file) as loaded:
            array: Array = loaded[_pick(path, name, loaded.files, "array")]
            return array
    except InputError:  # a ValueError too
        raise
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"expected {path} as NumPy saved it, got: {error}") from error


def _read_column(path: Path, name: str | None) -> Array:
    table = _read_table(path)
    fits = [field.name for field in table.schema if _is_vectors(field.type)]
    name = _pick(path, name, fits if name is None else table.column_names, "column of vectors")
    column = table.column(name)
    if not _is_vectors(column.type):
        raise InputError(
            f"expected column {name!r} of {path} to be FixedSizeList<float32 or float16>, "
            f"got {column.type}"
        )
    parts = [np.empty((0, column.type.list_size), column.type.value_type.to_pandas_dtype())]
    for chunk in column.chunks:
        flat = chunk.flatten()
        if chunk.null_count or flat.null_count:
            raise InputError(f"expected column {name!r} of {path} without nulls, got some")
        parts.append(flat.to_numpy(zero_copy_only=False).reshape(len(chunk), -1))
    array: Array = np.concatenate(parts)
    return array


def _read_table(path: Path) -> Any:
    import pyarrow as arrow

    if not path.is_file():
        raise FileNotFoundError(f"expected a file, got {path}")
    try:
        if path.suffix in PARQUET:
            return import_module("pyarrow.parquet").read_table(path)
        source = arrow.memory_map(str(path))
        try:
            return arrow.ipc.open_file(source).read_all()
        except arrow.ArrowInvalid:
            source.seek(0)
            return arrow.ipc.open_stream(source).read_all()
    except arrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"expected {path} to be an Arrow or Parquet file, got: {reason}"
        ) from error


def _pick(path: Path, name: str | None, names: list[str], noun: str) -> str:
    """The named one, or the only one."""
    known = ", ".join(names) or "none"
    if name is None:
        if len(names) != 1:
            raise InputError(
                f"expected {path} to hold one {noun}, got {known}; name one as {path}:NAME"
            )
        return names[0]
    if name not in names:
        raise InputError(f"expected {path} to hold {name!r}, got {known}")
    return name


def _is_vectors(kind: Any) -> bool:
    """Whether an Arrow type is a FixedSizeList of float32 or float16."""
    types = import_module("pyarrow").types
    return bool(
        types.is_fixed_size_list(kind)
        and (types.is_float32(kind.value_type) or types.is_float16(kind.value_type))
    )
