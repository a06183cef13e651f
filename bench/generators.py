"""Synthetic keys and queries that look like those of attention heads, at any length.

Two kinds of heads, both for inner product search:

`post_rope`: a retrieval head after rotary embedding. Keys come in runs of one topic along the
text (a few topics hold most of it), vary in few directions, have channels of very different
scale, and share a large mean, much of it in the slowest rotary channels, which hardly turn.
Queries ask for topics in directions that only partly agree with those of the keys, about a mean
that leans against that of the keys. All are rotated: keys at their positions, queries near the end
of the text and shortly after it. So keys and queries are two different clouds.

`out_of_distribution`: the same clouds before rotation, and the keys vary most in 24 directions in
which the queries have nearly no part: what separates keys best says little about their scores.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

KINDS = ("post_rope", "out_of_distribution")
TOPICS = 256
RANK = 48  # of the content of keys and queries
MEAN_RUN = 60  # tokens on one topic
MEAN_NORM = 8.0  # of the mean key
NUISANCE_RANK = 24
ROPE_BASE = 5e5


class Generated(NamedTuple):
    """One head: keys and queries, float32."""

    keys: Floats
    """[N, D], in the order of the text."""
    queries: Floats
    """[Q, D]"""
    query_sample: Floats
    """[2Q, D] other queries of the same kind."""


def make(
    kind: str, num_keys: int, dim: int = 128, num_queries: int = 256, seed: int = 0
) -> Generated:
    """Keys and queries of one head; the same for the same arguments."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    rng = np.random.default_rng(seed)
    key_basis = _normal(rng, dim, RANK) / np.float32(RANK**0.5)
    channel_scale = np.exp(0.6 * _normal(rng, dim))
    topics = 1.2 * _normal(rng, TOPICS, RANK)
    topic_of = _topic_runs(rng, num_keys)
    key_mean = _key_mean(rng, dim)
    content = topics[topic_of] + 0.8 * _normal(rng, num_keys, RANK)
    keys = content @ key_basis.T * channel_scale + 0.35 * _normal(rng, num_keys, dim) + key_mean

    total = 3 * num_queries
    query_basis = key_basis + 0.7 * _normal(rng, dim, RANK) / np.float32(RANK**0.5)
    query_mean = -0.5 * key_mean + MEAN_NORM * _normal(rng, dim) / np.float32(dim**0.5)
    content = topics[rng.choice(TOPICS, total)] + 0.9 * _normal(rng, total, RANK)
    queries = content @ query_basis.T + 0.35 * _normal(rng, total, dim) + query_mean

    if kind == "post_rope":
        late = rng.integers(int(0.9 * num_keys), num_keys + 2048, size=total)
        keys, queries = _rotated(keys, np.arange(num_keys)), _rotated(queries, late)
    else:
        nuisance = np.linalg.qr(_normal(rng, dim, NUISANCE_RANK))[0]
        keys = keys + 6 * _normal(rng, num_keys, NUISANCE_RANK) @ nuisance.T
        queries = queries - 0.9 * (queries @ nuisance) @ nuisance.T
    return Generated(keys, queries[:num_queries].copy(), queries[num_queries:].copy())


def _normal(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape).astype(np.float32)


def _topic_runs(rng: np.random.Generator, num_keys: int) -> NDArray[np.int64]:
    """[N] topic of each key: runs of geometric length, topics drawn by a power law."""
    popularity = np.arange(1.0, TOPICS + 1) ** -0.8
    lengths = rng.geometric(1 / MEAN_RUN, size=max(num_keys // 10, 64))
    drawn = rng.choice(TOPICS, len(lengths), p=popularity / popularity.sum())
    return np.resize(np.repeat(drawn, lengths), num_keys)


def _key_mean(rng: np.random.Generator, dim: int) -> Floats:
    """[D] mean key before rotation, heavy in the slowest channels of both rotary halves."""
    mean = _normal(rng, dim)
    half = dim // 2
    mean[half - 4 : half] *= 4
    mean[-4:] *= 4
    return mean * np.float32(MEAN_NORM / np.linalg.norm(mean))


def _rotated(x: Floats, positions: NDArray[np.int64]) -> Floats:
    """Rotary embedding, halves paired. x [N, D], positions [N]."""
    half = x.shape[1] // 2
    angles = positions[:, None] * ROPE_BASE ** (-np.arange(half) / half)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    first, second = x[:, :half], x[:, half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)
