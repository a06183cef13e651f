"""`wavekv index query` and `bench`: searching an index in a file."""

from __future__ import annotations

import argparse
import json
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
    queries = _read_queries(options.queries)
    how = {
        "budget": 1.0 if options.exact else options.budget,
        "top_p": options.top_p,
        "group": options.group,
        "rerank": options.rerank,
    }
    # a mapped file is there at once: no checksums, which would read all of it
    with WaveIndex.load(options.index, mmap=options.mmap, verify=not options.mmap) as index:
        # the first search of a process loads or compiles the kernels
        index.search(queries[..., : options.group, :], options.k, **how)
        start = time.perf_counter()
        found = index.search(queries, options.k, **how)
        seconds = time.perf_counter() - start
        result = {**_described(index, queries, options.k), **how, **_work(found)}
        result["ms_per_query"] = 1e3 * seconds / result["queries"]
    if options.output is not None:
        write_found(options.output, found.ids, found.scores)
    if options.json:
        scores = found.scores.astype(object)
        scores[found.ids < 0] = None  # JSON has no infinity
        print(json.dumps({**result, "ids": found.ids.tolist(), "scores": scores.tolist()}))
        return 0
    _print_found(found)
    print(
        f"{_title(result)}: of each {result['ntotal']} keys, {result['keys_scanned']:.0f} scanned, "
        f"{result['keys_reranked']:.0f} compared exactly; {result['pages_scored']:.0f} pages "
        f"ranked; {result['ms_per_query']:.3f} ms a query, all in one call"
    )
    return 0


def run_bench(options: argparse.Namespace) -> int:
    """Recall against exact search, and time, for each budget; one query a call."""
    queries = _read_queries(options.queries)
    with WaveIndex.load(options.index) as index:
        exact, *rows = _measure(index, queries, options.k, [1.0, *options.budgets])
        result = _described(index, queries, options.k)
        result |= {"exact_ms": exact["ms"], "budgets": rows}
    if options.json:
        print(json.dumps(result))
        return 0
    print(f"{_title(result)}, {result['ntotal']} keys; one query a call, median time")
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


def _read_queries(source: str) -> Array:
    queries = read_vectors(source)
    if queries.shape[-2] == 0:
        raise InputError(f"expected {source} to hold queries, got none")
    return queries


def _described(index: WaveIndex, queries: Array, k: int) -> dict[str, Any]:
    return {
        "queries": queries.shape[-2],
        "k": k,
        "ntotal": index.ntotal,
        "num_heads": index.num_heads,
        "dim": index.dim,
        "nbytes": index.nbytes,
    }


def _work(found: SearchResult) -> dict[str, float]:
    """Means over the queries of all heads."""
    names = ("pages_scored", "keys_scanned", "keys_reranked")
    return {name: float(getattr(found, name).mean()) for name in names}


def _title(result: dict[str, Any]) -> str:
    heads = "" if result["num_heads"] == 1 else f" of each of {result['num_heads']} heads"
    return f"{result['queries']} queries{heads}, k={result['k']}"


def _print_found(found: SearchResult) -> None:
    """The best keys of the first few queries, of each head in turn."""
    ids, scores = (x.reshape(-1, x.shape[-1]) for x in (found.ids, found.scores))
    num_queries, width = found.ids.shape[-2], min(_SHOWN_KEYS, ids.shape[1])
    rows = [("query", "best ids (scores)", *[""] * (width - 1))]
    for row in range(min(_SHOWN_QUERIES, len(ids))):
        head, query = divmod(row, num_queries)
        name = f"{query}" if found.ids.ndim == 2 else f"head {head}, {query}"
        best = zip(ids[row, :width], scores[row, :width], strict=True)
        rows.append((name, *("-" if i < 0 else f"{i} ({s:.4g})" for i, s in best)))
    print_table(rows)
