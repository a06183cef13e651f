"""What a search and an attention query return."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The keys that a search found; arrays of the kind the queries were. `scores, ids = result`."""

    scores: Any
    """[H, Q, k] float32 inner products, the highest first, then -inf as padding."""
    ids: Any
    """[H, Q, k] int64 positions of the keys, lower ones first among equals, then -1 as padding."""
    counts: Any
    """[H, Q] int64, how many were found."""
    pages_scored: Any
    """[H, Q] int64, pages that were ranked by their means."""
    keys_scanned: Any
    """[H, Q] int64, keys of the chosen pages, and of the tail, that were looked at."""
    keys_reranked: Any
    """[H, Q] int64, keys whose exact inner product was computed."""

    def __iter__(self) -> Iterator[Any]:
        yield self.scores
        yield self.ids


@dataclass(frozen=True, slots=True)
class AttendResult:
    """Attention over an index; arrays of the kind the queries were. `out, lse = result`."""

    out: Any
    """[H, Q, D] float32."""
    lse: Any
    """[H, Q] float32, the log of the sum of exponentiated logits, estimates included."""
    keys_attended: Any
    """[H, Q] int64, keys that were attended to exactly."""
    mass_estimated: Any
    """[H, Q] float32, the share of the softmax that was estimated."""

    def __iter__(self) -> Iterator[Any]:
        yield self.out
        yield self.lse


def as_given(tensors: Iterable[Tensor], queries: object, *, is_flat: bool) -> Iterator[Any]:
    """Tensors [H, ...] as the queries were: without heads if `is_flat`, numpy if not of torch."""
    is_numpy = not isinstance(queries, Tensor)
    for tensor in tensors:
        array = tensor.numpy() if is_numpy else tensor
        yield array[0] if is_flat else array
