"""`wavekv index query` and `bench`: searching an index in a file."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from typing import Any

import numpy as np
from tqdm import tqdm

from wavekv.cli.arrays import Array, expect_writable, read_vectors, write_found
from wavekv.cli.table import print_table
from wavekv.errors import InputError
from wavekv.index import SearchResult, WaveIndex, recall_at_k

_SHOWN_QUERIES, _SHOWN_KEYS = 5, 5
_WARM_UP = 3


def run_query(options: argparse.Namespace) -> int:
    """Find the best keys for each query; print them, and write them if asked to."""
    if options.exact and options.top_p is not None:
        raise InputError("--exact compares every key, so --top-p has nothing to choose; drop one")
    if options.output is not None:
        expect_writable(options.output)
    queries = read_vectors(options.queries)
    how = {
        "budget": 1.0 if options.exact else options.budget,
        "top_p": options.top_p,
        "group": options.group,
    }
    with _open(options) as index:
        # the first search of a process loads or compiles the kernels
        index.search(queries[..., : options.group, :], options.k, **how)
        start = time.perf_counter()
        found = index.search(queries, options.k, **how)
        seconds = time.perf_counter() - start
        result = {"k": options.k, **how, **_work(found, index), "ms_per_query": None}
    num_queries = queries.shape[-2]
    if num_queries:
        result["ms_per_query"] = 1e3 * seconds / num_queries
    if options.output is not None:
        write_found(options.output, found.ids, found.scores)
    if options.json:
        # JSON has no infinity
        scores = np.where(np.isfinite(found.scores), found.scores.astype(object), None)
        print(json.dumps({**result, "ids": found.ids.tolist(), "scores": scores.tolist()}))
    else:
        _print_found(found)
        _print_work(result, num_queries)
    return 0


def run_bench(options: argparse.Namespace) -> int:
    """Recall against exact search, and time, for each budget; one query a call."""
    queries = read_vectors(options.queries)
    if queries.shape[-2] == 0:
        raise InputError(f"expected {options.queries} to hold queries, got none")
    with _open(options) as index:
        exact, *rows = _measure(index, queries, options.k, [1.0, *options.budgets])
        result = {
            "k": options.k,
            "queries": queries.shape[-2],
            "num_heads": index.num_heads,
            "ntotal": index.ntotal,
            "nbytes": index.nbytes,
            "exact_ms": exact["ms"],
            "budgets": rows,
        }
    if options.json:
        print(json.dumps(result))
        return 0
    print(
        f"{index_name(result)}, {result['queries']} queries, k={options.k}, "
        "one query a call (of every head), median time"
    )
    table = [("budget", f"recall@{options.k}", "keys scanned", "ms a query")]
    for row in [*rows, exact]:
        name = "exact" if row is exact else f"{row['budget']}"
        share = f"{row['share_scanned']:.1%}"
        table.append((name, f"{row['recall']:.4f}", share, f"{row['ms']:.3f}"))
    print_table(table)
    return 0


def _measure(
    index: WaveIndex, queries: Array, k: int, budgets: list[float | int]
) -> list[dict[str, Any]]:
    """A row for each budget; the first is exact, and the others are compared with it."""
    count = queries.shape[-2]
    true_ids: Array | None = None
    rows = []
    for budget in tqdm(budgets, unit="budget", disable=None, leave=False):
        for i in range(min(_WARM_UP, count)):
            index.search(queries[..., i : i + 1, :], k, budget=budget)
        found, seconds = [], []
        for i in range(count):
            start = time.perf_counter()
            found.append(index.search(queries[..., i : i + 1, :], k, budget=budget))
            seconds.append(time.perf_counter() - start)
        ids = np.concatenate([one.ids for one in found], axis=-2)
        true_ids = ids if true_ids is None else true_ids
        scanned = np.mean([one.keys_scanned.mean() for one in found])
        rows.append(
            {
                "budget": budget,
                "recall": float(recall_at_k(ids, true_ids).mean()),
                "ms": 1e3 * statistics.median(seconds),
                "share_scanned": float(scanned) / max(1, index.ntotal),
            }
        )
    return rows
