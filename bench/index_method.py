"""An index at one setting of the index benchmark, and what was measured of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import faiss
import numpy as np
from index_heads import Head, K
from index_hnswlib import HnswlibPeer
from index_threads import THREADS

from wavekv.index.peers import KeyIndex, WavePeer


@dataclass(frozen=True)
class Work:
    """What a search of all queries of a head found and did, as far as it is known."""

    ids: np.ndarray
    """[Q, k]"""
    scanned: float | None
    """Keys or codes scored for a query, as a share of the keys."""
    pages_scored: float | None = None
    """Pages scored for a query, for each key."""


@dataclass
class Method:
    """A candidate at one setting: one peer a head, and what was measured."""

    family: str
    index: str
    setting: dict[str, float]
    peers: list[KeyIndex]
    work: list[Work]
    """Of each head."""
    found: list[np.ndarray]
    """[Q, k] ids of each head, one query a call."""
    single: dict[int, list[list[float]]] = field(default_factory=dict)
    """By threads: the seconds of every query in every round, one query a call."""
    batch: dict[int, list[float]] = field(default_factory=dict)
    """By threads: seconds a query in every round, the queries of a head in one call."""


def search_with_work(peer: KeyIndex, head: Head) -> Work:
    """One call for all queries; also the warm-up of the peer."""
    total = len(head.keys) * len(head.queries)
    if isinstance(peer, WavePeer):
        result = peer.index.search(head.queries, K, budget=peer.budget, rerank=peer.rerank)
        return Work(
            result.ids, result.keys_scanned.sum() / total, result.pages_scored.sum() / total
        )
    faiss.cvar.indexIVF_stats.reset()
    faiss.cvar.hnsw_stats.reset()
    ids = peer.search(head.queries, K)[1]
    if "IVF" in peer.name:
        return Work(ids, faiss.cvar.indexIVF_stats.ndis / total)
    if "HNSW" in peer.name:
        return Work(ids, faiss.cvar.hnsw_stats.ndis / total)
    return Work(ids, None if isinstance(peer, HnswlibPeer) else 1.0)


def as_row(method: Method, measured: dict[str, float | None]) -> dict[str, Any]:
    """JSON-ready figures of a method, in ms; medians over rounds, those of each round beside."""
    row: dict[str, Any] = {"family": method.family, "index": method.index}
    row |= {"setting": method.setting, **measured, "single": {}, "batch": {}}
    for threads in THREADS:
        low, middle, high = np.transpose(
            [1e3 * np.percentile(seconds, (10, 50, 90)) for seconds in method.single[threads]]
        )
        row["single"][str(threads)] = {
            "median_ms": float(np.median(middle)),
            "p10_ms": float(np.median(low)),
            "p90_ms": float(np.median(high)),
            "round_medians_ms": middle.tolist(),
        }
        each = [1e3 * seconds for seconds in method.batch[threads]]
        row["batch"][str(threads)] = {"median_ms": float(np.median(each)), "rounds_ms": each}
    return row
