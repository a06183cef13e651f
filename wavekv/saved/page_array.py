"""Pages of a context where they lie: in files that are mapped, or read by their descriptors."""

from __future__ import annotations

import mmap
import os
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from wavekv.saved.folder import Folder
from wavekv.saved.manifest import FileEntry


@dataclass(frozen=True, slots=True)
class PageArray:
    """Pages [num_pages, *stored_shape] in files of `rows_per_file` each; what pads the last file is
    zeros. Usable while its reader is open; what `map` and `open` gave stays."""

    folder: Folder
    files: dict[str, FileEntry]
    """By name; file k holds the pages from k * rows_per_file on."""
    num_pages: int
    rows_per_file: int
    """A power of two."""
    stored_shape: tuple[int, ...]
    dtype: torch.dtype
    crc32: Tensor
    """[num_pages] int64, of the bytes of each page; not compared with the pages yet."""

    def map(self) -> list[Tensor]:
        """The files as tensors [rows_per_file, *stored_shape], mapped. Nothing is read yet; a page
        that is written is copied and stays private."""
        return [self._mapped(name, entry) for name, entry in self.files.items()]

    def open(self) -> list[int]:
        """Descriptors of the files, for reading; the caller closes them."""
        with ExitStack() as stack:
            descriptors = []
            for name, entry in self.files.items():
                descriptor = self.folder.open_sized(name, entry)
                stack.callback(os.close, descriptor)
                # what lies around a page is of no use
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
                descriptors.append(descriptor)
            stack.pop_all()
        return descriptors

    def _mapped(self, name: str, entry: FileEntry) -> Tensor:
        mapped = self.folder.map(name, entry)
        mapped.madvise(mmap.MADV_RANDOM)
        return torch.frombuffer(mapped, dtype=self.dtype).view(-1, *self.stored_shape)
