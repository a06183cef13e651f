"""Putting a finished directory in the place of another."""

from __future__ import annotations

import shutil
from pathlib import Path


def swap(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`, and delete what was there."""
    old = path.parent / f".{path.name}.old"
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    if old.exists():
        shutil.rmtree(old)
