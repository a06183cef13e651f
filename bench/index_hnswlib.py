"""A graph of hnswlib, to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import hnswlib
import numpy as np
from index_heads import K

from wavekv.index.peers import Floats, Found


@dataclass(frozen=True)
class HnswlibPeer:
    """A graph of hnswlib behind the interface of the peers."""

    index: Any
    nbytes: int
    ef_search: int = K
    name: str = "hnswlib M16"

    @classmethod
    def build(cls, keys: Floats, *, ef_construction: int, num_threads: int) -> HnswlibPeer:
        index = hnswlib.Index("ip", keys.shape[1])
        index.init_index(len(keys), M=16, ef_construction=ef_construction, random_seed=0)
        index.add_items(keys, num_threads=num_threads)
        return cls(index, index.index_file_size())

    def search(self, queries: Floats, k: int, *, num_threads: int | None = None) -> Found:
        self.index.set_ef(self.ef_search)
        ids, distances = self.index.knn_query(queries, k, num_threads=num_threads or -1)
        return 1 - distances, ids.astype(np.int64)
