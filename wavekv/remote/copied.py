"""What a copy did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Copied:
    """Files of one context, its manifest not counted."""

    files: int
    """Copied by this call."""
    nbytes: int
    """Of them."""
    kept: int
    """Files that were there already."""
