"""How much of the true answers and the softmax mass a method of the index benchmark finds."""

from __future__ import annotations

import numpy as np
from index_heads import Head
from index_method import Method


def quality(method: Method, heads: list[Head]) -> dict[str, float | None]:
    """Means over heads and queries."""
    rows = [
        {
            "recall": recall(found, head.true_ids),
            "batch_recall": recall(work.ids, head.true_ids),
            "mass": mass_recall(found, head),
            "scanned": work.scanned,
            "pages_scored": work.pages_scored,
        }
        for head, found, work in zip(heads, method.found, method.work, strict=True)
    ]
    return {
        name: None if rows[0][name] is None else float(np.mean([row[name] for row in rows]))
        for name in rows[0]
    }


def recall(ids: np.ndarray, true_ids: np.ndarray) -> float:
    """Share of `true_ids` [Q, k] in `ids` [Q, k]."""
    found = [np.isin(true, got).mean() for got, true in zip(ids, true_ids, strict=True)]
    return float(np.mean(found))


def mass_recall(ids: np.ndarray, head: Head) -> float:
    """Softmax mass of the keys `ids` [Q, k]; -1 is no key."""
    logits = np.einsum("qd,qkd->qk", head.queries, head.keys[ids]) * head.keys.shape[1] ** -0.5
    weights = np.exp(logits - head.log_mass[:, None])
    return float((weights * (ids >= 0)).sum(1).mean())
