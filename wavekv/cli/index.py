"""`wavekv index`: build, query, describe and measure a `WaveIndex` in a file."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from wavekv.cli.arrays import Array, expect_folder, read_vectors
from wavekv.cli.index_search import run_bench, run_query
from wavekv.cli.table import mib, print_table
from wavekv.errors import InputError
from wavekv.index import IndexParams, WaveIndex
from wavekv.index.search import DEFAULT_BUDGET

_APPEND_BYTES = 1 << 25
_VECTORS = ".npy, .npz, .arrow, .feather or .parquet; FILE:NAME picks an array or a column"


def add_parser(commands: Any) -> None:
    """Add the `index` subcommand and its own."""
    help_text = "build, query and measure a vector index in a file"
    parser: argparse.ArgumentParser = commands.add_parser("index", help=help_text)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    build = actions.add_parser("build", help="index the keys in a file")
    build.add_argument("keys", metavar="KEYS", help=f"[N, D] or [H, N, D] in {_VECTORS}")
    build.add_argument("-o", "--output", type=Path, required=True, metavar="INDEX")
    build.add_argument("--values", metavar="FILE", help="values of the keys, for attention")
    build.add_argument("--query-sample", metavar="FILE", help="queries like those to come")
    for name, text in (("page_size", "keys in a page"), ("segment", "keys clustered at once")):
        default = getattr(IndexParams(), name)
        option = f"--{name.replace('_', '-')}"
        build.add_argument(option, type=int, default=default, help=f"{text} ({default})")
    build.add_argument("--code-dims", type=int, help="dimensions of a key that get a code")
    build.add_argument("--refine", action="store_true", help="cluster longer, for higher recall")
    _finish(build, run_build)

    query = actions.add_parser("query", help="find the keys of the highest inner product")
    _add_search(query, k=10)
    limit = query.add_mutually_exclusive_group()
    budget_help = f"keys to scan: a share, or a whole number of keys ({DEFAULT_BUDGET})"
    limit.add_argument("--budget", type=_budget, default=DEFAULT_BUDGET, help=budget_help)
    limit.add_argument("--exact", action="store_true", help="compare every key")
    query.add_argument("--top-p", type=float, help="scan only pages of this softmax mass")
    query.add_argument("--rerank", type=float, default=2.0, help="compare so many times k (2)")
    query.add_argument("--group", type=int, default=1, help="queries that share their pages (1)")
    query.add_argument("--mmap", action="store_true", help="map the file, unchecked, not read it")
    query.add_argument("-o", "--output", type=Path, help="ids and scores, as .npz or .arrow")
    _finish(query, run_query)

    info = actions.add_parser("info", help="what an index holds, and its sizes")
    info.add_argument("index", metavar="INDEX")
    info.add_argument("--verify", action="store_true", help="compare all checksums")
    _finish(info, run_info)

    bench = actions.add_parser("bench", help="recall and time for each budget")
    _add_search(bench, k=100)
    budgets = [0.01, 0.02, 0.04, 0.08, 0.16]
    bench.add_argument("--budgets", type=_budget, nargs="+", default=budgets, metavar="BUDGET")
    _finish(bench, run_bench)


def run_build(options: argparse.Namespace) -> int:
    """Index a file of keys."""
    params = IndexParams(
        page_size=options.page_size,
        segment=options.segment,
        code_dims=options.code_dims,
        refine=options.refine,
    )
    expect_folder(options.output)
    keys = read_vectors(options.keys)
    values = None if options.values is None else read_vectors(options.values)
    sample = None if options.query_sample is None else read_vectors(options.query_sample)
    start = time.perf_counter()
    index = _build(keys, params, values, sample)
    built = time.perf_counter()
    index.save(options.output)
    result = {
        "index": str(options.output),
        "build_s": built - start,
        "save_s": time.perf_counter() - built,
        **index.stats(),
    }
    if options.json:
        print(json.dumps(result))
        return 0
    took = f"built in {result['build_s']:.1f} s, saved in {result['save_s']:.1f} s"
    print(f"{options.output}: {took}")
    print_table(_rows(result))
    return 0


def run_info(options: argparse.Namespace) -> int:
    """Describe an index."""
    header = WaveIndex.describe(options.index)
    with WaveIndex.load(options.index, mmap=True, verify=options.verify) as index:
        stats = index.stats()
    result = {
        "index": options.index,
        "wavekv": header["wavekv"],
        "file_nbytes": Path(options.index).stat().st_size,
        "verified": options.verify,
        **stats,
        "parts": {part["name"]: part["nbytes"] for part in header["parts"]},
    }
    if options.json:
        print(json.dumps(result))
        return 0
    print(f"{options.index}: {mib(result['file_nbytes'])}, written by wavekv {result['wavekv']}")
    print_table(_rows(result))
    print("all checksums are right" if options.verify else "checksums not compared (--verify)")
    return 0


def _build(
    keys: Array, params: IndexParams, values: Array | None, sample: Array | None
) -> WaveIndex:
    """Append some whole segments at a time: that shows progress, needs no clustering twice, and
    reads a mapped file a part at a time."""
    if values is not None and values.shape != keys.shape:
        raise InputError(f"values must be {keys.shape} as the keys, got {values.shape}")
    count = keys.shape[-2]
    segment_bytes = max(1, keys[..., :1, :].nbytes * params.segment)
    step = params.segment * max(1, _APPEND_BYTES // segment_bytes)
    first = [None if array is None else array[..., :0, :] for array in (keys, values)]
    index = WaveIndex.build(first[0], params, values=first[1], query_sample=sample)
    with tqdm(total=count, unit=" keys", unit_scale=True, disable=None) as progress:
        for start in range(0, count, step):
            part = (Ellipsis, slice(start, start + step), slice(None))
            try:
                added = index.append(keys[part], None if values is None else values[part])
            except InputError as error:
                raise InputError(f"from key {start} on: {error}") from error
            progress.update(len(added))
    return index


def _rows(stats: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What an index holds, for people."""
    total = max(1, stats["ntotal"] * stats["num_heads"])

    def size(nbytes: int) -> tuple[str, str]:
        return mib(nbytes), f"{nbytes / total:.1f} bytes a key"

    sizes = {name: stats[f"{name}_nbytes"] for name in ("key", "code", "statistics")}
    held = "keys and values" if stats["has_values"] else "keys"
    sample = "with" if stats["has_query_sample"] else "without"
    return [
        ("keys", str(stats["ntotal"]), f"{_heads(stats['num_heads'])}, {stats['dim']} dimensions"),
        ("type", stats["dtype"], f"codes of {stats['code_dims']} dimensions"),
        ("query sample", sample, ""),
        (
            "pages",
            str(stats["num_pages"]),
            f"of {stats['params']['page_size']}, {stats['num_tail']} keys in the tail",
        ),
        (f"bytes: {held}", *size(sizes["key"])),
        ("bytes: codes", *size(sizes["code"])),
        ("bytes: means and the rest", *size(sizes["statistics"])),
        ("bytes: all", *size(stats["nbytes"])),
    ]


def _heads(count: int) -> str:
    return "1 head" if count == 1 else f"{count} heads"


def _add_search(parser: argparse.ArgumentParser, *, k: int) -> None:
    parser.add_argument("index", metavar="INDEX")
    parser.add_argument("queries", metavar="QUERIES", help=f"[Q, D] or [H, Q, D] in {_VECTORS}")
    parser.add_argument("-k", type=int, default=k, help=f"keys to find ({k})")


def _finish(parser: argparse.ArgumentParser, run: Any) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run)


def _budget(text: str) -> float | int:
    """A share, or a whole number of keys."""
    return int(text) if text.isdecimal() else float(text)
