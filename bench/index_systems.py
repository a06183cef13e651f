"""What the index benchmark compares: ours, indexes of faiss and hnswlib, and their settings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from index_heads import Head, K
from index_hnswlib import HnswlibPeer
from index_threads import CORES, THREADS, set_threads

from wavekv.index import IndexParams, WaveIndex
from wavekv.index.peers import FaissPeer, KeyIndex, WavePeer

WAVE, WAVE_SAMPLE = "wave", "wave + query sample"
OURS = (WAVE, WAVE_SAMPLE)
BUDGETS = (0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.16, 0.25)
GRAPH_EF = (100, 200, 400, 800, 1600)
GRAPH_EF_CONSTRUCTION = 100


@dataclass(frozen=True)
class Candidate:
    """An index to build for every head, and the settings to search it with."""

    family: str
    name: str
    build: Callable[[Head, int], KeyIndex]
    """Of a head with so many threads."""
    settings: list[dict[str, float]]
    build_threads: tuple[int, ...] = tuple(THREADS)


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
    return HnswlibPeer.build(head.keys, ef_construction=GRAPH_EF_CONSTRUCTION, num_threads=threads)


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


def with_setting(peer: KeyIndex, setting: dict[str, float]) -> KeyIndex:
    if isinstance(peer, FaissPeer):
        return peer.with_settings(**setting)
    return replace(peer, **setting)
