"""With how many threads the index benchmark builds and searches."""

from __future__ import annotations

import os

import faiss
import torch

CORES = len(os.sched_getaffinity(0))
THREADS = sorted({1, CORES})


def set_threads(threads: int) -> None:
    """Of everything that has its own setting; the others are told with each call."""
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
