"""Writing a context: arrays, tables and pages into a directory that appears whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from wavekv.errors import ClosedError, ContextFormatError, LayoutError
from wavekv.kernels.crc32 import crc32_joined, crc32_rows
from wavekv.saved.arrays import METADATA, ArrayForm, group_bytes, rows_per_file
from wavekv.saved.dtypes import bytes_of, host_copy, memory_of
from wavekv.saved.lock import locked
from wavekv.saved.manifest import FORMAT, NAME, Manifest
from wavekv.saved.names import ArrayNames, expect_name
from wavekv.saved.output import Output
from wavekv.saved.replace import clear, discard, recover, swap, temporary_path
from wavekv.saved.tables import CHECKSUMS, checksum_table, table_file, to_arrow


class ContextWriter:
    """Writes a context to `path`, which is new or a saved context that this one replaces.

    A context manager: entering takes the lock of `path`, leaving gives it back. Until `commit`
    exchanges the two at its end, `path` is what it was, whatever happens; from then on it is the
    new context, also if the system then fails to say that the exchange is on the disk.
    """

    def __init__(self, path: str | Path, progress: Callable[[int], None] | None = None) -> None:
        """progress: called with the bytes of each file once it is on disk, in the caller's
        thread."""
        # the directory itself, where the path is a link to it
        self.path = Path(os.path.realpath(path))
        self._progress = progress
        self._stack = ExitStack()
        self._output: Output | None = None
        self._names = ArrayNames()

    def __enter__(self) -> ContextWriter:
        """Raises:
        LockedError: another writer has the path.
        ContextFormatError: it names something else than a saved context.
        OSError: its folder is not there or takes no files.
        """
        if not self.path.parent.is_dir():
            raise FileNotFoundError(
                f"expected the folder {self.path.parent} to save to, got none; make it first"
            )
        with ExitStack() as stack:
            stack.enter_context(locked(self.path))
            recover(self.path)
            _expect_replaceable(self.path)
            clear(self.path)
            temporary = temporary_path(self.path)
            stack.callback(discard, temporary)
            self._output = Output(temporary, self._progress)
            stack.callback(self._output.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._output = None
        self._stack.close()

    def array(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of one dimension or more, from any device.

        Raises:
            LayoutError: a tensor or name that the format does not hold, or a name again.
            CapacityError, OSError: the disk does not take it.
        """
        output = self._opened()
        self._names.take(name)
        if not tensor.dim():
            raise LayoutError(f"expected {name} of one dimension or more, got a scalar")
        form = ArrayForm(tuple(tensor.shape), tensor.dtype, max(1, len(tensor)))
        output.write(f"{name}/{METADATA}", memoryview(form.to_bytes()))
        if form.num_files:
            output.write(form.file_name(name, 0), memory_of(host_copy(tensor)))

    def table(self, name: str, columns: Mapping[str, Tensor]) -> None:
        """Write columns [n, ...] of one length, from any device.

        Raises:
            LayoutError: columns or a name that the format does not hold, or a name again.
            CapacityError, OSError: the disk does not take them.
        """
        output = self._opened()
        file = _new_table_file(name, output)
        output.write(file, memoryview(to_arrow(columns, file)))

    def pages(
        self,
        name: str,
        num_pages: int,
        stored_shape: tuple[int, ...],
        dtype: torch.dtype,
        read: Callable[[int, int], Tensor],
    ) -> None:
        """Write an array [num_pages, *stored_shape] in files of many pages, and a table of the
        checksum of each page.

        read: gives the pages [first, last) as a contiguous CPU tensor [last - first,
        *stored_shape]; called for one range after another. The memory must not change before
        `commit` returns. Up to three files are in memory at once if each is new memory.

        Raises:
            LayoutError: pages or a name that the format does not hold, or a name again.
            CapacityError: the disk has no room for all pages; before any is written, if it says so.
            OSError: the disk does not take them.
        """
        output = self._opened()
        self._names.take(name)
        _new_table_file(checksum_table(name), output)
        page_bytes = math.prod(stored_shape) * dtype.itemsize
        if page_bytes <= 0:
            raise LayoutError(f"expected pages of {name} that hold bytes, got {stored_shape}")
        rows = rows_per_file(num_pages, page_bytes)
        form = ArrayForm((num_pages, *stored_shape), dtype, rows)
        metadata = form.to_bytes()
        output.require(num_pages * page_bytes, name)
        output.write(f"{name}/{METADATA}", memoryview(metadata))
        crcs = torch.empty(num_pages, dtype=torch.int64)
        padding = crc32_rows(torch.zeros(1, page_bytes, dtype=torch.uint8))
        for index in range(form.num_files):
            first, last = index * rows, min((index + 1) * rows, num_pages)
            pages = _expect_pages(read(first, last), (last - first, *stored_shape), dtype, name)
            data = bytes_of(pages).view(-1, page_bytes)
            crcs[first:last] = crc32_rows(data)
            whole = torch.cat([crcs[first:last], padding.expand(rows - (last - first))])
            crc32 = crc32_joined(whole, page_bytes)
            output.write_pages(form.file_name(name, index), data, form.file_bytes, crc32)
        self.table(checksum_table(name), {CHECKSUMS: crcs})

    def commit(self, description: dict[str, Any]) -> Manifest:
        """Put the context into its place, all of it on disk, and return its manifest.

        description: what JSON holds; goes into the manifest.

        Raises:
            ContextFormatError: the path has come to name something else than a saved context.
            CapacityError, OSError: the disk does not take it.
        """
        output = self._opened()
        for name in self._names.groups:
            output.write(f"{name}/{METADATA}".lstrip("/"), memoryview(group_bytes()))
        manifest = Manifest(description, dict(output.entries))
        data = manifest.to_bytes()
        output.finish()
        output.write_unlisted(NAME, memoryview(data))
        output.finish()
        _expect_replaceable(self.path)
        swap(output.root, self.path)
        self._output = None
        return manifest

    def _opened(self) -> Output:
        if self._output is None:
            raise ClosedError(
                f"expected a writer of {self.path} that is open, got one outside its with block or "
                "after commit; make a new one"
            )
        return self._output


def _expect_replaceable(path: Path) -> None:
    """The path is free, or names a saved context."""
    if not os.path.lexists(path):
        return
    try:
        body = json.loads((path / NAME).read_bytes())
        is_context = isinstance(body, dict) and body.get("format") == FORMAT
    except (OSError, ValueError, RecursionError):
        is_context = False
    if not is_context:
        found = "a directory of something else" if path.is_dir() else "a file"
        raise ContextFormatError(
            f"expected {path} to be a new path or a saved context, got {found}; choose another "
            "path, or remove it"
        )


def _new_table_file(name: str, output: Output) -> str:
    file = expect_name(table_file(name))
    if file in output.entries or "/" in name:
        raise LayoutError(f"expected names of tables of one part, once each, got {name!r}")
    return file


def _expect_pages(pages: Tensor, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Tensor:
    is_plain = pages.is_contiguous() and pages.device.type == "cpu"
    if tuple(pages.shape) != shape or pages.dtype != dtype or not is_plain:
        raise LayoutError(
            f"expected pages of {name} {shape} {dtype}, contiguous on the CPU, got "
            f"{tuple(pages.shape)} {pages.dtype}, strides {pages.stride()} on {pages.device}"
        )
    return pages
