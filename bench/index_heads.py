"""The attention heads that the index benchmark searches: keys, queries and the true answers."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import generators
import numpy as np
import torch
from captured import capture

from wavekv.cli.answering import VALUE_DIGITS
from wavekv.index.peers import Floats

K = 100
DATA_SETS = ("captured", *generators.KINDS)


@dataclass(frozen=True)
class Head:
    """The keys of one index and what is asked of it."""

    keys: Floats
    """[N, D]"""
    queries: Floats
    """[Q, D]"""
    query_sample: Floats
    """[S, D] other queries, for building."""
    true_ids: np.ndarray
    """[Q, k] keys of largest inner product, in any order."""
    log_mass: np.ndarray
    """[Q] logsumexp of the attention logits of all keys."""


def load_data(name: str, options: argparse.Namespace) -> list[Head]:
    if name == "captured":
        heads = captured_heads(options.tokens, questions=8 if options.quick else 16)
        return heads[::6] if options.quick else heads
    num_queries = 128 if options.quick else 256
    return [with_truth(*generators.make(name, options.keys, num_queries=num_queries))]


def captured_heads(num_tokens: int, questions: int) -> list[Head]:
    """Every KV head of the bundled model; every other question builds, the others test."""
    data = capture(num_tokens, questions)
    heads = []
    for keys, queries in zip(data.keys.flatten(0, 1), data.queries.flatten(0, 1), strict=True):
        by_question = queries.unflatten(1, (-1, VALUE_DIGITS))  # [G, questions, digits, D]
        sample, test = (
            by_question[:, start::2].reshape(-1, keys.shape[-1]).float().numpy()
            for start in range(2)
        )
        heads.append(with_truth(keys.float().contiguous().numpy(), test, sample))
    return heads


def with_truth(keys: Floats, queries: Floats, query_sample: Floats) -> Head:
    """Add the true ids and the softmax mass. keys [N, D], queries [Q, D], query_sample [S, D]."""
    scores = queries @ keys.T
    true_ids = np.argpartition(-scores, K, axis=1)[:, :K]
    logits = torch.from_numpy(scores) * keys.shape[1] ** -0.5
    return Head(keys, queries, query_sample, true_ids, logits.logsumexp(-1).numpy())
