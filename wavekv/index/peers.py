"""One interface for our index, exact search and any faiss index, to compare or exchange them.

Scores are inner products everywhere. faiss is optional and imported where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from wavekv.errors import ConfigError

if TYPE_CHECKING:
    from wavekv.index import WaveIndex

Floats = NDArray[np.float32]
Found = tuple[Floats, NDArray[np.int64]]


class KeyIndex(Protocol):
    """Anything that finds the keys of largest inner product."""

    @property
    def name(self) -> str: ...

    @property
    def nbytes(self) -> int: ...

    def search(self, queries: Floats, k: int, *, num_threads: int | None = None) -> Found:
        """Scores and ids [Q, k] of the best keys, best first; ids of -1 where there are fewer.

        Args:
            queries: [Q, D].
            num_threads: at most so many; None leaves it to the library.
        """
        ...


@dataclass(frozen=True, slots=True)
class ExactPeer:
    """Every inner product."""

    keys: Floats
    """[N, D]"""
    name: str = "exact"

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes

    def search(self, queries: Floats, k: int, *, num_threads: int | None = None) -> Found:
        from wavekv.index import exact_search

        with _threads(num_threads, torch.get_num_threads, torch.set_num_threads):
            scores, ids = exact_search(self.keys, queries, k)
        return scores, ids


@dataclass(frozen=True, slots=True)
class WavePeer:
    """A `WaveIndex` of one head [N, D] at one budget."""

    index: WaveIndex
    budget: float = 0.08
    rerank: float = 2.0
    name: str = "wave"

    @property
    def nbytes(self) -> int:
        return self.index.nbytes

    def search(self, queries: Floats, k: int, *, num_threads: int | None = None) -> Found:
        scores, ids = self.index.search(
            queries, k, budget=self.budget, rerank=self.rerank, num_threads=num_threads
        )
        return scores, ids


@dataclass(frozen=True, slots=True)
class FaissPeer:
    """A trained faiss index with its search settings; make one by `build`."""

    name: str
    index: Any
    nbytes: int
    """Size when serialised: codes, lists, graph and raw keys if it holds them."""
    parameters: Any = None
    """`faiss.SearchParameters` made of the settings, or None."""

    @classmethod
    def build(
        cls,
        keys: Floats,
        factory: str,
        *,
        device: str = "cpu",
        num_threads: int | None = None,
        ef_construction: int | None = None,
    ) -> FaissPeer:
        """Train an index made by `faiss.index_factory` on keys [N, D], and add them."""
        faiss = _faiss()
        if device not in ("cpu", "cuda"):
            raise ConfigError(f"device must be 'cpu' or 'cuda', got {device!r}")
        if device == "cuda" and faiss.get_num_gpus() == 0:
            raise ConfigError(
                "device='cuda' needs a faiss that finds a GPU, and this one finds none; "
                "pip install 'wavekv[faiss-gpu]' in place of faiss-cpu, or use device='cpu'"
            )
        index = faiss.index_factory(keys.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if ef_construction is not None:
            faiss.ParameterSpace().set_index_parameter(index, "efConstruction", ef_construction)
        with _threads(num_threads, faiss.omp_get_max_threads, faiss.omp_set_num_threads):
            index.train(keys)
            index.add(keys)
        nbytes = len(faiss.serialize_index(index))
        if device == "cuda":
            index = faiss.index_cpu_to_all_gpus(index)
        return cls(factory, index, nbytes)

    def with_settings(
        self,
        *,
        nprobe: int | None = None,
        k_factor_rf: float | None = None,
        ef_search: int | None = None,
    ) -> FaissPeer:
        """The same index, searched with these settings; None is the default of faiss.

        Args:
            nprobe: lists that an IVF index reads.
            k_factor_rf: so many times k candidates get exact scores in the refine stage.
            ef_search: candidates that an HNSW index keeps.
        """
        named = {"nprobe": nprobe, "k_factor_rf": k_factor_rf, "ef_search": ef_search}
        left = {name: value for name, value in named.items() if value is not None}
        parameters = _search_parameters(_faiss(), self.index, left)
        if left:
            raise ConfigError(f"{self.name} has no setting {', '.join(left)}; leave it out")
        return replace(self, parameters=parameters)

    def search(self, queries: Floats, k: int, *, num_threads: int | None = None) -> Found:
        """See `KeyIndex.search`; where keys are missing, faiss gives the lowest float32."""
        faiss = _faiss()
        with _threads(num_threads, faiss.omp_get_max_threads, faiss.omp_set_num_threads):
            scores, ids = self.index.search(queries, k, params=self.parameters)
        return scores, ids


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError("this needs faiss: pip install 'wavekv[faiss]'") from error
    return faiss


@contextmanager
def _threads(
    num_threads: int | None, get: Callable[[], int], put: Callable[[int], None]
) -> Iterator[None]:
    """Set the thread count of a library, which is global, and put the old one back."""
    if num_threads is None:
        yield
        return
    before = get()
    put(num_threads)
    try:
        yield
    finally:
        put(before)


def _search_parameters(faiss: Any, index: Any, left: dict[str, float]) -> Any:
    """`faiss.SearchParameters` for `index` and the stages inside it; takes what it uses of `left`.

    They go with each call: setting them on the index would change it for its other users.
    """
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        inner = _search_parameters(faiss, index.base_index, left)
        k_factor = left.pop("k_factor_rf", index.k_factor)
        return faiss.IndexRefineSearchParameters(k_factor=k_factor, base_index_params=inner)
    if isinstance(index, faiss.IndexPreTransform):
        inner = _search_parameters(faiss, index.index, left)
        return inner and faiss.SearchParametersPreTransform(index_params=inner)
    ivf = (faiss.IndexIVF, getattr(faiss, "GpuIndexIVF", faiss.IndexIVF))
    if isinstance(index, ivf) and "nprobe" in left:
        return faiss.SearchParametersIVF(nprobe=left.pop("nprobe"))
    if isinstance(index, faiss.IndexHNSW) and "ef_search" in left:
        return faiss.SearchParametersHNSW(efSearch=left.pop("ef_search"))
    return None
