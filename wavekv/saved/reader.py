"""Reading a context: what is small is verified and mapped, pages are left where they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from wavekv.errors import ContextFormatError
from wavekv.saved.arrays import METADATA, ArrayForm
from wavekv.saved.dtypes import expect_bools
from wavekv.saved.folder import Folder
from wavekv.saved.manifest import FileEntry, Manifest
from wavekv.saved.opening import with_manifest
from wavekv.saved.page_array import PageArray
from wavekv.saved.tables import CHECKSUMS, checksum_table, from_arrow, table_file
from wavekv.saved.verify import problems

_NUM_THREADS = 4


class ContextReader:
    """An open context; a context manager. What it gave stays when it is closed."""

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        """Use `open`."""
        self.path, self.manifest = folder.path, manifest
        self._folder = folder
        self._checked: set[str] = set()
        self._chunks: dict[str, list[str]] = {}
        for name in manifest.files:
            array, separator, _ = name.rpartition("/c/")
            if separator:
                self._chunks.setdefault(array, []).append(name)

    @classmethod
    def open(cls, path: str | Path) -> ContextReader:
        """Open a saved context. Reads its manifest and the sizes of its files.

        Raises:
            FileNotFoundError: nothing is there.
            ContextFormatError: it is no saved context, is of a newer version, or a file is missing
                or of another size.
        """
        folder, raw = with_manifest(Path(os.path.realpath(path)))
        try:
            reader = cls(folder, Manifest.parse(raw, str(folder.path)))
            for name, entry in reader.manifest.files.items():
                with folder.opened(name, entry):
                    pass
        except BaseException:
            folder.close()
            raise
        return reader

    def close(self) -> None:
        """Close the directory."""
        self._folder.close()

    def __enter__(self) -> ContextReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def arrays(self) -> list[str]:
        """Names of all arrays, those of pages among them."""
        end = f"/{METADATA}"
        named = {name.removesuffix(end) for name in self.manifest.files if name.endswith(end)}
        groups = {name.rpartition("/")[0] for name in named}
        groups.update(parent for group in groups for parent in _parents(group))
        return sorted(named - groups)

    @property
    def tables(self) -> list[str]:
        """Names of all tables, those of checksums of pages among them."""
        named = [Path(name) for name in self.manifest.files]
        return sorted(file.stem for file in named if str(file) == table_file(file.stem))

    def check(self, names: Iterable[str]) -> None:
        """Verify the checksums of arrays and tables at once, on several threads, which `array` and
        `table` do not do again then. Of an array of pages this reads all pages.

        Raises:
            ContextFormatError: a file is damaged, or no array or table has such a name.
            OSError: the disk does not give one.
        """
        files: list[str] = []
        for name in names:
            found = [table_file(name), f"{name}/{METADATA}", *self._chunks.get(name, [])]
            found = [file for file in found if file in self.manifest.files]
            files += found or [self._missing(name)]
        self._check(files)

    def array(self, name: str) -> Tensor:
        """An array, mapped: memory that may be written, and keeps what is written to itself.

        Raises:
            ContextFormatError: there is none, or it is damaged.
            OSError: the disk does not give it.
        """
        form = self._form(name)
        if form.num_files == 0:
            return torch.empty(form.shape, dtype=form.dtype)
        if form.rows_per_file != form.shape[0]:
            raise ContextFormatError(
                f"expected {self.path / name} in one file, got {form.rows_per_file} rows a file of "
                f"shape={form.shape}; read it as pages"
            )
        (file,) = self._files(name, form)
        self._check([file])
        mapped = self._folder.map(file, self.manifest.files[file])
        tensor = torch.frombuffer(mapped, dtype=form.dtype).view(form.shape)
        return expect_bools(tensor, str(self.path / file))

    def table(self, name: str) -> dict[str, Tensor]:
        """The columns of a table, mapped as an array is.

        Raises:
            ContextFormatError: there is none, or it is damaged.
            OSError: the disk does not give it.
        """
        file = table_file(name)
        self._check([file])
        mapped = self._folder.map(file, self.manifest.files[file])
        return from_arrow(mapped, str(self.path / file))

    def pages(self, name: str) -> PageArray:
        """Pages, none of which is read; their checksums are.

        Raises:
            ContextFormatError: there are none, or what describes them is damaged.
            OSError: the disk does not give that.
        """
        form = self._form(name)
        files = {file: self.manifest.files[file] for file in self._files(name, form)}
        if form.rows_per_file & (form.rows_per_file - 1):
            raise ContextFormatError(
                f"expected {self.path / name / METADATA} with a power of two of rows a file, got "
                f"{form.rows_per_file}; it is no array of pages"
            )
        columns = self.table(checksum_table(name))
        crc32 = columns.get(CHECKSUMS)
        if crc32 is None or crc32.shape != (form.shape[0],) or crc32.dtype != torch.int64:
            raise ContextFormatError(
                f"expected {self.path / table_file(checksum_table(name))} with a column "
                f"{CHECKSUMS} [{form.shape[0]}] int64, got {list(columns)}; take another copy"
            )
        return PageArray(
            self._folder,
            files,
            form.shape[0],
            form.rows_per_file,
            form.shape[1:],
            form.dtype,
            crc32,
        )

    def verify(self, progress: Callable[[int], None] | None = None) -> list[str]:
        """Read every file and return what is wrong, nothing if the context is sound. Names files,
        links and folders that the manifest does not know, too.

        progress: called with the bytes of each file that was read.
        """
        return problems(self, self._folder, progress)

    def _form(self, name: str) -> ArrayForm:
        file = f"{name}/{METADATA}"
        self._check([file])
        return ArrayForm.parse(self._folder.read(file), str(self.path / file))

    def _files(self, name: str, form: ArrayForm) -> list[str]:
        """The chunk files of an array, all of them of the size that its form says."""
        found = self._chunks.get(name, [])
        if len(found) != form.num_files:
            raise ContextFormatError(
                f"expected {form.num_files} files of {self.path / name} by its shape={form.shape}, "
                f"got {len(found)} in the manifest; take another copy of the context"
            )
        files = [form.file_name(name, index) for index in range(form.num_files)]
        for file in files:
            nbytes = self._entry(file).nbytes
            if nbytes != form.file_bytes:
                raise ContextFormatError(
                    f"expected {self.path / file} of bytes={form.file_bytes} by its array's shape, "
                    f"got {nbytes}; take another copy of the context"
                )
        return files

    def _check(self, files: list[str]) -> None:
        """Verify the checksums of files that were not verified before."""
        entries = {file: self._entry(file) for file in files if file not in self._checked}
        if len(entries) == 1:
            self._folder.check(*entries.popitem())
        elif entries:
            with ThreadPoolExecutor(_NUM_THREADS, "wavekv-check") as pool:
                list(pool.map(self._folder.check, entries, entries.values()))
        self._checked.update(files)

    def _entry(self, file: str) -> FileEntry:
        if file not in self.manifest.files:
            self._missing(file)
        return self.manifest.files[file]

    def _missing(self, name: str) -> str:
        raise ContextFormatError(
            f"expected {name} in the manifest of {self.path}, got none of this name; it is another "
            "context, or one of a newer version"
        )


def _parents(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:i]) for i in range(len(parts))]
