"""How long the searches of the index benchmark take."""

from __future__ import annotations

import gc
import random
import time
from itertools import product

import numpy as np
from index_heads import Head, K
from index_method import Method
from index_threads import THREADS, set_threads
from tqdm import tqdm

TIMED_QUERIES = 640  # about so many a round: more are spread over the rounds


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
