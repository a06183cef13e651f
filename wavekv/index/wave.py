"""WaveIndex: the keys of the highest inner product, found among many without reading them all."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from wavekv.errors import ClosedError, DtypeError, InputError, ReadOnlyError
from wavekv.index import inputs, storage
from wavekv.index.attend import attend_state, expect_group, page_limits
from wavekv.index.codec import query_metric
from wavekv.index.inputs import Array
from wavekv.index.params import IndexParams
from wavekv.index.result import AttendResult, SearchResult, as_given
from wavekv.index.retrieval import Logits
from wavekv.index.search import DEFAULT_BUDGET, SearchOptions, search_state
from wavekv.index.state import IndexState

_MAX_KEYS = 2**31 - 1
"""Ids are kept as int32."""


class WaveIndex:
    """An index of keys [H, N, D] for inner products: H independent heads of N keys.

    Keys are clustered into pages of a fixed size, segment by segment. A search ranks all pages by
    their means, scans four-bit codes of the keys in the best, and computes exact products of the
    best of those. Ids are positions, and stay. The index is a function of its keys, parameters and
    query sample: how the keys came, in one build or many appends, makes no difference.

    Searching is safe from several threads; one thread may change an index while none searches.

    Memory beside the keys, bytes for each: `code_dims / 2 + 1 + 4 / P` of codes, `(D + 8) / P + 4`
    of means and ids, for pages of P; 78 at D = 128 and the defaults. With values, `attend` needs
    `(8 D + 4) / P` bytes more, and `8 D**2 / max(segment, 16 D)`. Building holds a few copies of
    what is added at a time. A build is linear in N; an append that fills a segment clusters its
    keys again, up to `log2(segment / (16 P))` times each.
    """

    def __init__(self, state: IndexState, *, is_read_only: bool = False) -> None:
        """Over a state; `build` and `load` make one."""
        self._held: IndexState | None = state
        self._is_read_only = is_read_only

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
            ConfigError: more `code_dims` than the keys have dimensions.
        """
        keyed, is_flat = inputs.as_heads("keys", keys)
        metric = None
        if query_sample is not None:
            sample, _ = inputs.as_heads("query_sample", query_sample, is_flat=is_flat)
            H, _, D = keyed.shape
            inputs.expect_like("query_sample", sample, heads=H, dim=D, device=keyed.device)
            if sample.shape[1] == 0:
                raise InputError("query_sample must hold a query, got none; leave it out instead")
            inputs.expect_finite("query_sample", sample)
            metric = query_metric(sample)
        empty = keyed[:, :0]
        state = IndexState(
            empty,
            params or IndexParams(),
            is_flat=is_flat,
            has_values=values is not None,
            metric=metric,
        )
        index = cls(state)
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
        state = self._writable()
        new = [self._accept("keys", keys)]
        if (values is not None) != state.has_values:
            wanted = "values too" if state.has_values else "no values, as when it was built"
            raise InputError(
                f"this index wants {wanted}, got {'none' if values is None else 'some'}"
            )
        if values is not None:
            new.append(self._accept("values", values))
            if new[0].shape != new[1].shape:
                raise InputError(
                    f"values must be {tuple(new[0].shape)} as the keys, got {tuple(new[1].shape)}"
                )
        first, count = self.ntotal, new[0].shape[1]
        if first + count > _MAX_KEYS:
            raise InputError(f"an index holds at most {_MAX_KEYS} keys a head, got {first + count}")
        if count:
            state.resize(first + count, torch.stack(new, 1))
        return range(first, first + count)

    def truncate(self, n: int) -> None:
        """Keep the keys with ids below `n`. All or nothing.

        Raises:
            InputError: n is negative or more than `ntotal`.
            ReadOnlyError: the index is mapped from a file.
        """
        state = self._writable()
        n = inputs.expect_count("n", n, least=0)
        if n > self.ntotal:
            raise InputError(f"n must be at most ntotal={self.ntotal}, got {n}")
        if n < self.ntotal:
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
        asked = self._accept_queries(queries, group, check_finite)
        scores, ids, work = search_state(asked, state, options)
        found = scores, ids, *work
        is_numpy = not isinstance(queries, Tensor)
        return SearchResult(*as_given(found, is_flat=self.is_flat, is_numpy=is_numpy))

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

        Pages are ranked by their statistics, the best 32 budgets of them again by the codes of
        their keys.

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
        if not state.has_values:
            raise InputError("attend needs values, got an index without: build(keys, values=...)")
        asked = self._accept_queries(queries, group, check_finite, largest=inputs.LARGEST_ATTENDED)
        limits = page_limits(budget, top_p, state.pages.num_pages, self.params.page_size)
        for name, number in (("scale", scale), ("softcap", softcap)):
            if number is not None:
                inputs.expect_positive(name, number)
        logits = Logits(scale or self.dim**-0.5, softcap)
        found = attend_state(asked, state, logits, limits=limits, top_p=top_p, group=group)
        is_numpy = not isinstance(queries, Tensor)
        return AttendResult(*as_given(found, is_flat=self.is_flat, is_numpy=is_numpy))

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
        if mmap and torch.device(device).type != "cpu":
            raise InputError(f"a mapped index lives on the CPU, got device={str(device)!r}")
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
        state = self._state
        return {
            "ntotal": self.ntotal,
            "num_heads": self.num_heads,
            "dim": self.dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "params": self.params.to_dict(),
            "code_dims": state.code_dims,
            "has_values": state.has_values,
            "has_query_sample": state.metric is not None,
            "num_pages": state.pages.num_pages,
            "num_segments": len(state.segments_of(self.ntotal)),
            "num_tail": state.tail.shape[2],
            "nbytes": self.nbytes,
            "key_nbytes": self.key_nbytes,
            "code_nbytes": self.code_nbytes,
            "statistics_nbytes": self.statistics_nbytes,
        }

    @property
    def key_nbytes(self) -> int:
        """Bytes of the keys, and values, themselves."""
        return self._nbytes("pages", "tail")

    @property
    def code_nbytes(self) -> int:
        """Bytes of the codes of keys and their scales."""
        return self._nbytes("codes", "code_scale", "page_scale")

    @property
    def statistics_nbytes(self) -> int:
        """Bytes of all else: means, ids, statistics for `attend`, and the codec."""
        return self.nbytes - self.key_nbytes - self.code_nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is held."""
        return sum(part.nbytes for part in self._state.tensors().values())

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
        self._held = None

    def __enter__(self) -> WaveIndex:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._held is None:
            return "WaveIndex(closed)"
        return (
            f"WaveIndex(ntotal={self.ntotal}, num_heads={self.num_heads}, dim={self.dim}, "
            f"dtype={self.dtype}, device={self.device}, nbytes={self.nbytes})"
        )

    def _nbytes(self, *names: str) -> int:
        tensors = self._state.tensors()
        return sum(tensors[name].nbytes for name in names)

    @property
    def _state(self) -> IndexState:
        if self._held is None:
            raise ClosedError("expected an open index, got one after close(); load it again")
        return self._held

    def _writable(self) -> IndexState:
        state = self._state
        if self._is_read_only:
            raise ReadOnlyError(
                "expected an index in memory, got one that is mapped from its file; "
                "load it with mmap=False to change it"
            )
        return state

    def _accept(self, name: str, array: Array) -> Tensor:
        """Keys or values [H, S, D] that fit."""
        tensor, _ = inputs.as_heads(name, array, is_flat=self.is_flat)
        inputs.expect_like(name, tensor, heads=self.num_heads, dim=self.dim, device=self.device)
        if tensor.dtype != self.dtype:
            raise DtypeError(f"{name} must be {self.dtype} as the index, got {tensor.dtype}")
        is_attended = self._state.has_values
        largest = inputs.LARGEST_ATTENDED if is_attended else inputs.LARGEST
        inputs.expect_finite(name, tensor, largest=largest)
        return tensor

    def _accept_queries(
        self, queries: Array, group: int, check_finite: bool, *, largest: float = inputs.LARGEST
    ) -> Tensor:
        """Queries [H, Q, D] float32 that fit."""
        tensor, _ = inputs.as_heads("queries", queries, is_flat=self.is_flat)
        inputs.expect_like(
            "queries", tensor, heads=self.num_heads, dim=self.dim, device=self.device
        )
        expect_group(tensor, group)
        if check_finite:
            inputs.expect_finite("queries", tensor, largest=largest)
        return tensor.float().contiguous()
