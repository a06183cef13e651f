"""WaveIndex: the keys of the highest inner product, found among many without reading them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from wavekv.index import sizes, storage
from wavekv.index.accepted import accept_length, accept_queries, accept_tokens, empty_state_for
from wavekv.index.attend import AttendOptions, attend_state
from wavekv.index.held import HeldState
from wavekv.index.inputs import Array
from wavekv.index.params import IndexParams
from wavekv.index.result import AttendResult, SearchResult, as_given
from wavekv.index.search import DEFAULT_BUDGET, SearchOptions, search_state
from wavekv.index.state import IndexState


class WaveIndex:
    """An index of keys [H, N, D] for inner products: H independent heads of N keys.

    Keys are clustered into pages of a fixed size, segment by segment. A search ranks all pages by
    their means, scans four-bit codes of the keys in the best, and computes exact products of the
    best of those. Ids are positions, and stay. The index is a function of its keys, parameters and
    query sample: how the keys came, in one build or many appends, makes no difference.

    Searching is safe from several threads; one thread may change an index while none searches.

    Memory beside the keys, bytes for each: `code_dims / 2 + 1 + 4 / P` of codes, `(D + 8) / P + 4`
    of means and ids, for pages of P; 78 at D = 128 and the defaults. With values, `attend` needs
    `3 D / 8 + 1 + (27 D / 32 + 4.5) / P` bytes more, and `4 D**2 / max(segment, 16 D)`; 88 at
    D = 128 and the defaults. Building holds a few copies of what is added at a time. A build is
    linear in N; an append that fills a segment clusters its keys again, up to
    `log2(segment / (16 P))` times each.
    """

    def __init__(self, state: IndexState, *, is_read_only: bool = False) -> None:
        """Over a state; `build` and `load` make one."""
        self._held = HeldState(state, is_read_only=is_read_only)

    @classmethod
    def build(
        cls,
        keys: Array,
        params: IndexParams | None = None,
        *,
        values: Array | None = None,
        query_sample: Array | None = None,
    ) -> WaveIndex:
        """Index keys.

        Args:
            keys: [H, N, D], or [N, D] for one head; float32, float16 or bfloat16; a numpy array or
                a torch tensor on any device. N may be 0. They are copied.
            params: how to cluster and code them.
            values: of the shape of the keys; `attend` needs them.
            query_sample: [H, S, D] or [S, D], a few hundred or more queries like those to come (of
                all heads of a group together). Keys are then clustered and coded as such queries
                see them, and directions that they hardly see get no code. It pays most where keys
                vary in directions that queries ignore.

        Raises:
            InputError: shapes that do not fit, or numbers that are not finite.
            DtypeError: another type.
            ConfigError: more `code_dims` than the keys have dimensions, or pages of more than 128
                keys with values.
        """
        params, has_values = params or IndexParams(), values is not None
        index = cls(empty_state_for(keys, query_sample, params, has_values=has_values))
        index.append(keys, values)
        return index

    def append(self, keys: Array, values: Array | None = None) -> range:
        """Add keys (and values) of the kind the index was built with; return their ids.

        All or nothing: after an error the index is as it was.

        Raises:
            InputError: as `build`; or values that are missing, or not wanted.
            DtypeError: another type than the index holds.
            ReadOnlyError: the index is mapped from a file.
        """
        state = self._held.writable
        new = accept_tokens(keys, values, state)
        first, count = state.num_keys, new.shape[2]
        if count:
            state.resize(first + count, new)
        return range(first, first + count)

    def truncate(self, n: int) -> None:
        """Keep the keys with ids below `n`. All or nothing.

        Raises:
            InputError: n is negative or more than `ntotal`.
            ReadOnlyError: the index is mapped from a file.
        """
        state = self._held.writable
        n = accept_length(n, state)
        if n < state.num_keys:
            state.resize(n, state.tail[:, :, :0])

    def search(
        self,
        queries: Array,
        k: int,
        *,
        budget: float | int = DEFAULT_BUDGET,
        top_p: float | None = None,
        group: int = 1,
        rerank: float = 2.0,
        scale: float | None = None,
        num_threads: int | None = None,
        check_finite: bool = True,
    ) -> SearchResult:
        """Find, for each query, the `k` keys of the highest inner product. `scores, ids = result`.

        Args:
            queries: [H, Q, D], or [Q, D] if the keys were [N, D].
            budget: how many keys to scan by their codes: a share in (0, 1], or a number; at least
                as many as fill k. 1.0 without `top_p` is exact: every key is compared.
            top_p: scan the fewest pages whose estimated share of the softmax of `scale * q.k`
                reaches this, at most `budget`.
            group: so many consecutive queries share one choice of pages, by their summed softmax
                shares, as the query heads of a KV head in attention do.
            rerank: exact products of so many times `k` keys, the best by their codes.
            scale: of the logits for `top_p` and `group`; by default D ** -0.5.
            num_threads: at most so many; by default as many as torch uses. No effect on results.
            check_finite: False spares a look at every query (some microseconds).

        Returns:
            Scores are raw inner products in float32, exact for every id returned. Where there are
            fewer than k keys, -inf and -1 fill up.

        Raises:
            InputError, DtypeError: queries or options that do not fit.
            ClosedError: after `close`.

        Cost for a query: D bytes for each page, `code_dims / 2 + 1` for each key scanned, and
        `rerank * k` keys.
        """
        state = self._state
        scale = self.dim**-0.5 if scale is None else scale
        options = SearchOptions(k, budget, top_p, group, rerank, scale, num_threads)
        asked = accept_queries(queries, state, group, check_finite=check_finite)
        scores, ids, work = search_state(asked, state, options)
        found = scores, ids, *work
        return SearchResult(*as_given(found, queries, is_flat=state.is_flat))

    def attend(
        self,
        queries: Array,
        *,
        budget: float | int = 0.02,
        top_p: float | None = None,
        group: int = 1,
        scale: float | None = None,
        softcap: float | None = None,
        check_finite: bool = True,
    ) -> AttendResult:
        """Softmax attention over all keys: exact over the best pages, estimated over the others.

        Pages are ranked by their statistics, the best 32 budgets of them again by two bits a
        dimension of their keys, and the best 8 budgets of those by three.

        Args:
            queries: [H, Q, D], or [Q, D] if the keys were [N, D].
            budget: how many keys to attend to exactly: a share in (0, 1], or a number.
            top_p: the fewest pages whose estimated mass reaches this share, at most `budget`.
            group: so many consecutive queries share one choice of pages.
            scale: logits are `scale * q.k`; by default D ** -0.5.
            softcap: bends logits to `softcap * tanh(logit / softcap)`.
            check_finite: False spares a look at every query.

        Raises:
            InputError: the index has no values; queries or options that do not fit.
            DtypeError: another type.
            ClosedError: after `close`.
        """
        state = self._state
        asked = accept_queries(queries, state, group, check_finite=check_finite, is_attend=True)
        scale = self.dim**-0.5 if scale is None else scale
        options = AttendOptions(budget, top_p, group, scale, softcap)
        found = attend_state(asked, state, options)
        return AttendResult(*as_given(found, queries, is_flat=state.is_flat))

    def save(self, path: str | Path) -> None:
        """Write the index to one file. The file appears whole or not at all: after an error, a full
        disk or a killed process, what was there before is still there.

        Raises:
            OSError: it cannot be written.
        """
        storage.save(self._state, path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        mmap: bool = False,
        device: str | torch.device = "cpu",
        verify: bool = True,
    ) -> WaveIndex:
        """Read an index that `save` wrote.

        Args:
            path: the file.
            mmap: map the file instead of reading it: pages come from disk as searches need them,
                and with `verify=False` it opens at once. Such an index cannot change, and lives on
                the CPU.
            device: where to put it.
            verify: compare the checksums of all parts, which reads the whole file (about 1 GB/s).

        Raises:
            IndexFormatError: not an index, damaged, cut short, or of a newer format.
            InputError: mmap with a device other than the CPU.
            OSError: it cannot be read.
        """
        state = storage.load(path, mmap=mmap, device=torch.device(device), verify=verify)
        return cls(state, is_read_only=mmap)

    @staticmethod
    def describe(path: str | Path) -> dict[str, Any]:
        """What `save` wrote about an index, without reading its parts.

        Raises:
            IndexFormatError, OSError: as `load`.
        """
        return storage.describe(path)

    def stats(self) -> dict[str, Any]:
        """Numbers about the index, ready for JSON."""
        return sizes.stats(self._state)

    @property
    def key_nbytes(self) -> int:
        """Bytes of the keys, and values, themselves."""
        return sizes.key_nbytes(self._state)

    @property
    def code_nbytes(self) -> int:
        """Bytes of the codes of keys and their scales."""
        return sizes.code_nbytes(self._state)

    @property
    def statistics_nbytes(self) -> int:
        """Bytes of all else: means, ids, statistics for `attend`, and the codec."""
        return sizes.statistics_nbytes(self._state)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is held."""
        return sizes.total_nbytes(self._state)

    @property
    def ntotal(self) -> int:
        """Keys of each head."""
        return self._state.num_keys

    def __len__(self) -> int:
        return self.ntotal

    @property
    def dim(self) -> int:
        """Dimensions of a key."""
        return self._state.tail.shape[3]

    @property
    def num_heads(self) -> int:
        """Heads, each with keys of its own."""
        return self._state.tail.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the keys."""
        return self._state.tail.dtype

    @property
    def device(self) -> torch.device:
        """Where the index lives."""
        return self._state.tail.device

    @property
    def params(self) -> IndexParams:
        """How it was built."""
        return self._state.params

    @property
    def is_flat(self) -> bool:
        """Keys, queries and results have no heads: [N, D], not [1, N, D]."""
        return self._state.is_flat

    def close(self) -> None:
        """Free the memory, or the file. Every later use but `close` is a ClosedError."""
        self._held.free()

    def __enter__(self) -> WaveIndex:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if not self._held.is_open:
            return "WaveIndex(closed)"
        return (
            f"WaveIndex(ntotal={self.ntotal}, num_heads={self.num_heads}, dim={self.dim}, "
            f"dtype={self.dtype}, device={self.device}, nbytes={self.nbytes})"
        )

    @property
    def _state(self) -> IndexState:
        return self._held.readable
