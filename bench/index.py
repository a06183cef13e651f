"""Recall against latency of `WaveIndex`, faiss and hnswlib on keys of attention heads.

    python bench/index.py --out bench/results/index.json --plot docs/assets/index_recall.svg \
        --table docs/index_benchmark.md

Three data sets: keys and queries of the bundled model over 32K tokens (`captured`: every KV head is
an index of its own, figures are means over the heads) and the two generators of `generators.py` at
100K keys (`post_rope`, `out_of_distribution`). Every method is timed in every round, in another
order each time, so that a disturbance of the machine hits all of them; a figure is the median over
the rounds. Needs faiss and hnswlib. About 15 minutes on two CPU cores; `--quick` about two.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

# Idle OpenMP threads that spin take the core from the others where a machine is shared: with the
# default, two threads can be 30 times as slow as one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import faiss
import generators
import hnswlib
import numpy as np
import torch
from captured import capture
from machine import machine_record
from tqdm import tqdm

from wavekv.cli.answering import VALUE_DIGITS
from wavekv.index import IndexParams, WaveIndex
from wavekv.index.peers import FaissPeer, Floats, Found, KeyIndex, WavePeer

K = 100
CORES = len(os.sched_getaffinity(0))
THREADS = sorted({1, CORES})
TARGETS = (0.80, 0.90, 0.95, 0.99)
ACCEPTED_ON = "post_rope"
BUDGETS = (0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.16, 0.25)
GRAPH_EF = (100, 200, 400, 800, 1600)
GRAPH_EF_CONSTRUCTION = 100
TIMED_QUERIES = 640  # about so many a round: more are spread over the rounds

WAVE, WAVE_SAMPLE = "wave", "wave + query sample"
OURS = (WAVE, WAVE_SAMPLE)
COLOURS = {
    WAVE: "#d62728",
    WAVE_SAMPLE: "#ff7f0e",
    "exact": "#7f7f7f",
    "IVF": "#1f77b4",
    "IVF SQ8": "#17becf",
    "PQ 2 bits + refine": "#2ca02c",
    "PQ 1 bit + refine": "#98df8a",
    "IVF PQ + refine": "#9467bd",
    "IVF PQ residual + refine": "#c5b0d5",
    "RaBitQ 2 bits + refine": "#bcbd22",
    "IVF RaBitQ 2 bits + refine": "#dbdb8d",
    "HNSW (faiss)": "#8c564b",
    "HNSW (hnswlib)": "#e377c2",
}


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


@dataclass(frozen=True)
class HnswlibPeer:
    """A graph of hnswlib behind the interface of the peers."""

    index: Any
    nbytes: int
    ef_search: int = K
    name: str = "hnswlib M16"

    @classmethod
    def build(cls, keys: Floats, *, num_threads: int) -> HnswlibPeer:
        index = hnswlib.Index("ip", keys.shape[1])
        index.init_index(len(keys), M=16, ef_construction=GRAPH_EF_CONSTRUCTION, random_seed=0)
        index.add_items(keys, num_threads=num_threads)
        return cls(index, index.index_file_size())

    def search(self, queries: Floats, k: int, *, num_threads: int | None = None) -> Found:
        self.index.set_ef(self.ef_search)
        ids, distances = self.index.knn_query(queries, k, num_threads=num_threads or -1)
        return 1 - distances, ids.astype(np.int64)


@dataclass(frozen=True)
class Candidate:
    """An index to build for every head, and the settings to search it with."""

    family: str
    name: str
    build: Callable[[Head, int], KeyIndex]
    """Of a head with so many threads."""
    settings: list[dict[str, float]]
    build_threads: tuple[int, ...] = tuple(THREADS)


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


def load_data(name: str, options: argparse.Namespace) -> list[Head]:
    if name == "captured":
        heads = captured_heads(options.tokens, questions=8 if options.quick else 16)
        return heads[::6] if options.quick else heads
    num_queries = 128 if options.quick else 256
    return [with_truth(*generators.make(name, options.keys, num_queries=num_queries))]


def candidates(num_keys: int, dim: int) -> list[Candidate]:
    """What is compared at N keys of D dimensions."""
    lists = 2 ** round(math.log2(3.3 * num_keys**0.5))  # 1024 at 100K keys
    pq, small_pq = f"PQ{dim // 2}x4fs", f"PQ{dim // 4}x4fs"
    nprobe = grid(nprobe=(16, 32, 64, 128, 192, 256))
    probe_refine = grid(nprobe=(64, 128, 256), k_factor_rf=(4, 8, 12))
    refine = grid(k_factor_rf=(2, 4, 6, 7, 8, 12, 16))
    table = [
        ("exact", "Flat", [{}]),
        ("IVF", f"IVF{lists},Flat", nprobe),
        ("IVF SQ8", f"IVF{lists},SQ8", nprobe),
        ("PQ 2 bits + refine", f"{pq},RFlat", refine),
        ("PQ 1 bit + refine", f"{small_pq},RFlat", grid(k_factor_rf=(4, 8, 16, 32))),
        ("IVF PQ + refine", f"IVF{lists},{pq},RFlat", probe_refine),
        ("IVF PQ residual + refine", f"IVF{lists},{pq}r,RFlat", probe_refine),
        # the codes of RaBitQ assume rotated keys, and faiss does not rotate by itself
        ("RaBitQ 2 bits + refine", f"RR{dim},RaBitQfs2,RFlat", grid(k_factor_rf=(4, 8))),
        (
            "IVF RaBitQ 2 bits + refine",
            f"RR{dim},IVF{lists},RaBitQfs2,RFlat",
            grid(nprobe=(64, 256), k_factor_rf=(8,)),
        ),
    ]
    graph_settings, all_cores = grid(ef_search=GRAPH_EF), (CORES,)
    return [
        *(wave_candidate(page, sampled) for sampled in (False, True) for page in (8, 16)),
        *(Candidate(family, spec, faiss_builder(spec), grids) for family, spec, grids in table),
        # graphs take long to build: never with one thread
        Candidate("HNSW (faiss)", "HNSW32", faiss_builder("HNSW32"), graph_settings, all_cores),
        Candidate("HNSW (hnswlib)", "hnswlib M16", build_hnswlib, graph_settings, all_cores),
    ]


def grid(**values: Iterable[float]) -> list[dict[str, float]]:
    """Every combination, as settings."""
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


def wave_candidate(page_size: int, sampled: bool) -> Candidate:
    def build(head: Head, _: int) -> KeyIndex:
        sample = head.query_sample if sampled else None
        params = IndexParams(page_size=page_size)
        # takes as many threads as torch does, which `build_all` sets
        return WavePeer(WaveIndex.build(head.keys, params, query_sample=sample))

    family = WAVE_SAMPLE if sampled else WAVE
    settings = grid(budget=BUDGETS)
    if sampled:  # shorter codes: more candidates can pay
        settings += grid(budget=BUDGETS[4:], rerank=(3.0,))
    return Candidate(family, f"{family}, pages of {page_size}", build, settings)


def faiss_builder(factory: str) -> Callable[[Head, int], KeyIndex]:
    efc = GRAPH_EF_CONSTRUCTION if "HNSW" in factory else None
    return lambda head, threads: FaissPeer.build(
        head.keys, factory, num_threads=threads, ef_construction=efc
    )


def build_hnswlib(head: Head, threads: int) -> KeyIndex:
    return HnswlibPeer.build(head.keys, num_threads=threads)


def with_setting(peer: KeyIndex, setting: dict[str, float]) -> KeyIndex:
    if isinstance(peer, FaissPeer):
        return peer.with_settings(**setting)
    return replace(peer, **setting)


def set_threads(threads: int) -> None:
    """Of everything that has its own setting; the others are told with each call."""
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)


def build_all(candidate: Candidate, heads: list[Head]) -> tuple[list[KeyIndex], dict[str, Any]]:
    """The peers of the last thread setting, and a record of the builds."""
    seconds: dict[str, float] = {}
    if candidate.family in OURS:  # compiled kernels are kept between runs: no part of a build
        set_threads(CORES)
        small = replace(heads[0], keys=heads[0].keys[:4096])
        candidate.build(small, CORES).search(small.queries, K)
    for threads in candidate.build_threads:
        set_threads(threads)
        began = time.perf_counter()
        peers = [candidate.build(head, threads) for head in heads]
        seconds[str(threads)] = (time.perf_counter() - began) / len(heads)
    nbytes = sum(peer.nbytes for peer in peers) / len(heads)
    record = {"family": candidate.family, "index": candidate.name}
    return peers, {**record, "seconds": seconds, "nbytes": nbytes}


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


def recall(ids: np.ndarray, true_ids: np.ndarray) -> float:
    """Share of `true_ids` [Q, k] in `ids` [Q, k]."""
    found = [np.isin(true, got).mean() for got, true in zip(ids, true_ids, strict=True)]
    return float(np.mean(found))


def mass_recall(ids: np.ndarray, head: Head) -> float:
    """Softmax mass of the keys `ids` [Q, k]; -1 is no key."""
    logits = np.einsum("qd,qkd->qk", head.queries, head.keys[ids]) * head.keys.shape[1] ** -0.5
    weights = np.exp(logits - head.log_mass[:, None])
    return float((weights * (ids >= 0)).sum(1).mean())


def time_round(method: Method, heads: list[Head], threads: int, number: int, rounds: int) -> None:
    """Time a method once, at the thread setting in force; fills in what it found."""
    total = sum(len(head.queries) for head in heads)
    step = min(max(1, total // TIMED_QUERIES), rounds)
    single, batch = [], 0.0
    for head, peer, found in zip(heads, method.peers, method.found, strict=True):
        rows = range(number % step, len(head.queries), step)
        for row in rows[:8]:
            peer.search(head.queries[row : row + 1], K, num_threads=threads)
        for row in rows:
            query = head.queries[row : row + 1]
            began = time.perf_counter()
            ids = peer.search(query, K, num_threads=threads)[1]
            single.append(time.perf_counter() - began)
            found[row] = ids[0]
        queries = np.ascontiguousarray(head.queries[rows.start :: step])
        began = time.perf_counter()
        peer.search(queries, K, num_threads=threads)
        batch += time.perf_counter() - began
    method.single.setdefault(threads, []).append(single)
    method.batch.setdefault(threads, []).append(batch / len(single))


def time_all(methods: list[Method], heads: list[Head], rounds: int) -> None:
    """Rounds over all methods, in another order each time."""
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    for threads, number in product(THREADS, range(rounds)):
        set_threads(threads)
        order = list(methods)
        shuffle(order)
        for method in tqdm(order, desc=f"{threads} threads, round {number + 1}"):
            time_round(method, heads, threads, number, rounds)
    gc.enable()


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


def run_data(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Build, check and time everything on one data set."""
    heads = load_data(name, options)
    num_keys, dim = heads[0].keys.shape
    builds, methods = [], []
    for candidate in tqdm(candidates(num_keys, dim), desc=f"{name}: build"):
        peers, record = build_all(candidate, heads)
        builds.append(record)
        for setting in candidate.settings[:: 2 if options.quick else 1]:
            chosen = [with_setting(peer, setting) for peer in peers]
            work = [search_with_work(*pair) for pair in zip(chosen, heads, strict=True)]
            found = [np.full_like(done.ids, -1) for done in work]
            methods.append(Method(candidate.family, candidate.name, setting, chosen, work, found))
    time_all(methods, heads, options.rounds)
    return {
        "num_keys": num_keys,
        "dim": dim,
        "heads": len(heads),
        "queries_per_head": len(heads[0].queries),
        "query_sample_per_head": len(heads[0].query_sample),
        "best_mass": float(np.mean([mass_recall(head.true_ids, head) for head in heads])),
        "builds": builds,
        "methods": [as_row(method, quality(method, heads)) for method in methods],
    }


def fastest(rows: list[dict], kind: str, threads: int, target: float) -> dict[str, Any] | None:
    """The row with the lowest `kind` ("single" or "batch") latency among those of that recall."""
    measure = "recall" if kind == "single" else "batch_recall"
    good = [row for row in rows if row[measure] >= target]
    return min(good, key=lambda row: row[kind][str(threads)]["median_ms"], default=None)


def acceptance(data: dict[str, Any], target: float = 0.95) -> dict[str, Any]:
    """How many times as fast as faiss we are at that recall, and to build; one thread."""
    rows = data["methods"]
    peers = [row for row in rows if row["family"] not in OURS and "hnswlib" not in row["family"]]
    build_seconds = {build["index"]: build["seconds"].get("1") for build in data["builds"]}
    ivf = next(build["index"] for build in data["builds"] if build["family"] == "IVF")
    figures: dict[str, Any] = {"recall": target, "threads": 1, "build_baseline": ivf}
    for family in OURS:
        mine = [row for row in rows if row["family"] == family]
        for kind in ("single", "batch"):
            best, other = (fastest(group, kind, 1, target) for group in (mine, peers))
            if best is None or other is None:
                figures[f"{family}: {kind}"] = None
                continue
            best_ms, other_ms = (row[kind]["1"]["median_ms"] for row in (best, other))
            figures[f"{family}: {kind}"] = {
                "ours": label(best),
                "ours_ms": best_ms,
                "faiss": label(other),
                "faiss_ms": other_ms,
                "ratio": other_ms / best_ms,
                "build_seconds": build_seconds[best["index"]],
                "build_ratio": build_seconds[ivf] / build_seconds[best["index"]],
            }
    return figures


def label(row: dict[str, Any]) -> str:
    return f"{row['index']} ({setting_text(row)})" if row["setting"] else row["index"]


def setting_text(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{name.removesuffix('_rf')} {value:g}" for name, value in row["setting"].items()
    )


def plot(record: dict[str, Any], path: Path) -> None:
    """Recall against latency of one query a call, one thread: the front of every family."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "wavekv", "svg.fonttype": "none"})
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator

    sets = record["data"]
    figure, axes = plt.subplots(
        1, len(sets), figsize=(5 * len(sets), 5.2), sharey=True, squeeze=False
    )
    for axis, (name, data) in zip(axes[0], sets.items(), strict=True):
        for family, colour in COLOURS.items():
            points = front([row for row in data["methods"] if row["family"] == family])
            ours = family in OURS
            style = {"linewidth": 2.6 if ours else 1.3, "zorder": 3 if ours else 2}
            axis.plot(*zip(*points, strict=True), "o-", ms=4, color=colour, label=family, **style)
        axis.set(xscale="log", title=f"{name}: {size_text(data)}", ylim=(0.5, 1.005))
        axis.set_xlabel("ms a query (one a call, one thread)")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.grid(True, which="both", alpha=0.25)
    axes[0][0].set_ylabel(f"recall@{record['k']}")
    handles, names = axes[0][0].get_legend_handles_labels()
    columns = 5 if len(sets) > 2 else 2 * len(sets)
    figure.legend(handles, names, loc="lower center", ncols=columns, frameon=False)
    legend_height = 0.05 * (-(-len(COLOURS) // columns))
    figure.tight_layout(rect=(0, legend_height, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def front(rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(ms, recall) of the settings that no faster one of the family beats, by latency."""
    points = sorted((row["single"]["1"]["median_ms"], row["recall"]) for row in rows)
    kept: list[tuple[float, float]] = []
    for ms, found in points:
        if not kept or found > kept[-1][1]:
            kept.append((ms, found))
    return kept


def size_text(data: dict[str, Any]) -> str:
    heads = f"{data['heads']} heads, " if data["heads"] > 1 else ""
    return f"{heads}{data['num_keys']} keys, D = {data['dim']}"


def as_markdown(record: dict[str, Any], plot_path: Path, table_path: Path) -> str:
    image = os.path.relpath(plot_path, table_path.parent)
    lines = [
        "# Index benchmark",
        "",
        f"Finding the {record['k']} keys of largest inner product. *captured*: keys and queries of "
        "the bundled model, one index for each KV head, figures are means over the heads. "
        "*post_rope* and *out_of_distribution*: generated keys and queries (`bench/generators.py`)."
        " A cell is the lowest latency at which a setting reaches that recall, in ms a query, and "
        "the setting; a latency is the median over queries, then over rounds "
        f"({record['rounds']}). OpenMP threads wait without spinning (`OMP_WAIT_POLICY`). "
        "*k_factor* and *rerank* multiply the number of candidates that get exact scores; *budget* "
        "is the share of keys whose codes are read. Bytes hold the keys too.",
        "",
        f"![Recall against latency]({image})",
        "",
    ]
    for name, data in record["data"].items():
        lines += [
            f"## {name}: {size_text(data)}",
            "",
            f"{data['queries_per_head']} queries a head, {data['query_sample_per_head']} others as "
            f"query sample. The best {record['k']} keys hold {data['best_mass']:.1%} of the "
            "softmax mass.",
            "",
        ]
        for kind, threads in (("single", 1), ("batch", CORES)):
            lines += [*table_lines(data, kind, threads), ""]
    lines += acceptance_lines(record)
    lines.append(
        f"Made by `{record['machine']['command']}` ({record['machine']['cpu']}, "
        f"{record['cpu_model']}, faiss {record['versions']['faiss']}, commit "
        f"{record['machine']['commit']}); raw numbers in `{record['out']}`."
    )
    return "\n".join(lines) + "\n"


def table_lines(data: dict[str, Any], kind: str, threads: int) -> list[str]:
    """One row for each index, one column for each recall."""
    what = "One query a call" if kind == "single" else "All queries in a call"
    lines = [
        f"{what}, {threads} thread{'s' * (threads > 1)}:",
        "",
        "| index | "
        + " | ".join(f"recall ≥ {target:.2f}" for target in TARGETS)
        + " | "
        + " | ".join(f"build, {n} thread{'s' * (n > 1)}" for n in THREADS)
        + " | MB |",
        "|---" * (2 + len(TARGETS) + len(THREADS)) + "|",
    ]
    for build in data["builds"]:
        rows = [row for row in data["methods"] if row["index"] == build["index"]]
        cells = [
            cell_text(fastest(rows, kind, threads, target), kind, threads) for target in TARGETS
        ]
        seconds = [build["seconds"].get(str(n)) for n in THREADS]
        cells += ["not run" if value is None else f"{value:.2f} s" for value in seconds]
        lines.append(f"| {build['index']} | {' | '.join(cells)} | {build['nbytes'] / 1e6:.1f} |")
    return lines


def cell_text(row: dict[str, Any] | None, kind: str, threads: int) -> str:
    if row is None:
        return "–"
    ms = f"{row[kind][str(threads)]['median_ms']:.3f}"
    return f"{ms} ({setting_text(row)})" if row["setting"] else ms


def acceptance_lines(record: dict[str, Any]) -> list[str]:
    figures = record["acceptance"]
    if not figures:
        return []
    lines = [
        f"## Against faiss at recall {figures['recall']} on {ACCEPTED_ON}, one thread",
        "",
        "| | ours | ms | fastest of faiss | ms | times as fast | "
        f"build, times as fast as {figures['build_baseline']} |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in figures.items():
        if isinstance(row, dict):
            lines.append(
                f"| {name} | {row['ours']} | {row['ours_ms']:.3f} | {row['faiss']} | "
                f"{row['faiss_ms']:.3f} | {row['ratio']:.2f} | {row['build_ratio']:.2f} |"
            )
        elif row is None:
            lines.append(f"| {name} | not reached | – | – | – | – | – |")
    return [*lines, ""]


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown")


def parse() -> argparse.Namespace:
    names = ("captured", *generators.KINDS)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/index.json"))
    parser.add_argument("--plot", type=Path, default=Path("docs/assets/index_recall.svg"))
    parser.add_argument("--table", type=Path, default=Path("docs/index_benchmark.md"))
    parser.add_argument("--data", nargs="+", choices=names, default=names)
    parser.add_argument("--keys", type=int, help="of the generated sets; default 100000")
    parser.add_argument("--tokens", type=int, help="of the captured set; default 32768")
    parser.add_argument("--rounds", type=int, help="default 3")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="every other setting, one round, 20000 keys, 2 heads at 9216 tokens",
    )
    options = parser.parse_args()
    options.keys = options.keys or (20000 if options.quick else 100000)
    options.tokens = options.tokens or (9216 if options.quick else 32768)
    options.rounds = options.rounds or (1 if options.quick else 3)
    return options


def main() -> None:
    options = parse()
    began, load = time.time(), os.getloadavg()
    data = {name: run_data(name, options) for name in options.data}
    record = {
        "machine": machine_record(),
        "cpu_model": cpu_model(),
        "versions": {"faiss": faiss.__version__, "hnswlib": version("hnswlib")},
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
        "load_average": {"before": load, "after": os.getloadavg()},
        "seconds": round(time.time() - began),
        "out": str(options.out),
        "k": K,
        "rounds": options.rounds,
        "quick": options.quick,
        "data": data,
        "acceptance": acceptance(data[ACCEPTED_ON]) if ACCEPTED_ON in data else None,
    }
    for path in (options.out, options.plot, options.table):
        path.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    plot(record, options.plot)
    options.table.write_text(as_markdown(record, options.plot, options.table))
    print(json.dumps(record["acceptance"], indent=1))


if __name__ == "__main__":
    main()
