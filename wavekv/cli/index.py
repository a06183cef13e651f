"""`wavekv index`: build, query, describe and measure a `WaveIndex` in a file."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from wavekv.cli import index_bench
from wavekv.cli.arrays import (
    Array,
    expect_folder,
    expect_writable,
    read_vectors,
    write_found,
)
from wavekv.cli.index_bench import print_rows
from wavekv.errors import InputError
from wavekv.index import IndexParams, SearchResult, WaveIndex
from wavekv.index.search import DEFAULT_BUDGET

_APPEND_BYTES = 1 << 25
_SHOWN_QUERIES, _SHOWN_KEYS = 5, 5


def add_parser(commands: Any) -> None:
    """Add the `index` subcommand and its own."""
    parser = commands.add_parser("index", help="build, query and measure a vector index in a file")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    vectors = ".npy, .npz, .arrow, .feather or .parquet; FILE:NAME picks an array or column"

    build = actions.add_parser("build", help="index the keys in a file")
    build.add_argument("keys", metavar="KEYS", help=f"[N, D] or [H, N, D]: {vectors}")
    build.add_argument("-o", "--output", type=Path, required=True, metavar="INDEX")
    build.add_argument("--values", metavar="FILE", help="values of the keys, for attention")
    build.add_argument("--query-sample", metavar="FILE", help="queries like those to come")
    build.add_argument("--page-size", type=int, default=IndexParams.page_size)
    build.add_argument("--segment", type=int, default=IndexParams.segment)
    build.add_argument("--code-dims", type=int, help="dimensions that get a code of four bits")

    query = actions.add_parser("query", help="find the keys of the highest inner product")
    query.add_argument("queries", metavar="QUERIES", help=f"[Q, D] or [H, Q, D]: {vectors}")
    query.add_argument("-k", type=int, default=10, help="keys to find (10)")
    limit = query.add_mutually_exclusive_group()
    limit.add_argument(
        "--budget",
        type=_budget,
        default=DEFAULT_BUDGET,
        help=f"share of the keys to scan, or a whole number of keys ({DEFAULT_BUDGET})",
    )
    limit.add_argument("--exact", action="store_true", help="compare every key")
    query.add_argument("--top-p", type=float, help="scan the pages of this softmax mass")
    query.add_argument("--group", type=int, default=1, help="queries that share their pages")
    query.add_argument("--mmap", action="store_true", help="map the file, do not read it")
    query.add_argument("-o", "--output", type=Path, help="ids and scores as .npz or .arrow")

    info = actions.add_parser("info", help="what is in an index, and its sizes")
    info.add_argument("--verify", action="store_true", help="compare the checksums too")

    bench = actions.add_parser("bench", help="recall and time by budget")
    bench.add_argument("queries", metavar="QUERIES", help=f"[Q, D] or [H, Q, D]: {vectors}")
    bench.add_argument("-k", type=int, default=100, help="keys to find (100)")
    bench.add_argument(
        "--budgets", type=_budget, nargs="+", default=[0.01, 0.02, 0.04, 0.08, 0.16]
    )
    runs = {build: run_build, query: run_query, info: run_info, bench: index_bench.run}
    for action, run in runs.items():
        action.add_argument("--json", action="store_true", help="print one JSON object instead")
        action.set_defaults(run=run)
    for action in (query, info, bench):
        # before QUERIES
        action._positionals._group_actions.insert(0, action.add_argument("index", metavar="INDEX"))


def run_build(options: argparse.Namespace) -> int:
    """Index a file of keys."""
    params = IndexParams(
        page_size=options.page_size, segment=options.segment, code_dims=options.code_dims
    )
    expect_folder(options.output)
    keys = read_vectors(options.keys)
    values = None if options.values is None else read_vectors(options.values)
    sample = None if options.query_sample is None else read_vectors(options.query_sample)
    start = time.perf_counter()
    index = _build(keys, params, values, sample)
    built = time.perf_counter()
    index.save(options.output)
    seconds = {"build": built - start, "save": time.perf_counter() - built}
    result = {"path": str(options.output), "seconds": seconds, **index.stats()}
    if options.json:
        print(json.dumps(result))
        return 0
    print_rows(
        [
            (str(options.output), f"built in {seconds['build']:.1f} s, saved in {seconds['save']:.1f} s"),
            *_stat_rows(result),
        ]
    )
    return 0
