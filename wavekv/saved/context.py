"""A saved context to look at: what it holds and belongs to, without a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from wavekv.saved.manifest import Manifest
from wavekv.saved.reader import ContextReader


class SavedContext:
    """A saved context on a disk; `OffloadedCache.load` makes a cache of it."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Use `open`."""
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: str | Path) -> SavedContext:
        """Look at the saved context at `path`: reads its manifest and the sizes of its files.

        Raises:
            FileNotFoundError: nothing is there.
            ContextFormatError: it is not a saved context, is of a newer version, or a file is
                missing or of another size.
        """
        with ContextReader.open(path) as reader:
            return cls(reader.path, reader.manifest)

    def __repr__(self) -> str:
        size = f"{self.num_sequences} x {self.num_tokens} tokens, {self.nbytes / 2**20:.1f} MiB"
        return f"SavedContext({str(self.path)!r}: {size}, {self.model.get('model_type')})"

    @property
    def num_tokens(self) -> int | None:
        """Tokens of each sequence, padding included; None if the manifest does not say."""
        return self._number("num_tokens")

    @property
    def num_sequences(self) -> int | None:
        """Sequences; None if the manifest does not say."""
        return self._number("num_sequences")

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        return self.manifest.nbytes

    @property
    def model(self) -> dict[str, Any]:
        """What is known of the model it is of: fields of its configuration, dtype, digest."""
        return self._object("model")

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of the `OffloadConfig` that it was made with."""
        return self._object("settings")

    @property
    def token_ids(self) -> Tensor | None:
        """[B, T] int64, if they were saved.

        Raises:
            ContextFormatError: they are damaged.
        """
        if not self.manifest.description.get("has_token_ids"):
            return None
        with ContextReader.open(self.path) as reader:
            return reader.array("token_ids").clone()

    def verify(self, progress: Callable[[int], None] | None = None) -> list[str]:
        """Read all files and return what is wrong, nothing if the context is sound.

        progress: called with the bytes of each file that was read.
        """
        with ContextReader.open(self.path) as reader:
            return reader.verify(progress)

    def _number(self, name: str) -> int | None:
        found = self.manifest.description.get(name)
        return found if isinstance(found, int) else None

    def _object(self, name: str) -> dict[str, Any]:
        found = self.manifest.description.get(name)
        return found if isinstance(found, dict) else {}
