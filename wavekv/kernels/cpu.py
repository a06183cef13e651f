"""The public functions for CPU tensors: unwrap the torch tensors, launch the numba kernels.

Arguments are taken as validated by `dispatch` and `search`. Pages, keys and statistics are read in
place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from wavekv.kernels import (
    cpu_dense,
    cpu_merge,
    cpu_pages,
    cpu_project,
    cpu_search,
    cpu_select,
)
from wavekv.kernels.cpu_launch import DTYPE_CODES, float32, launch, splits, view
from wavekv.kernels.cpu_math import FLOAT32

if TYPE_CHECKING:
    from wavekv.kernels.page_codec import PageCodec
    from wavekv.kernels.search import SearchParts

# Selecting costs about as much for so many log masses as the other kernels cost for one row.
_SELECT_ROWS = 16

# States of fewer floats than this are merged on the calling thread.
_MERGE_SERIAL = 1 << 16


def select(
    log_mass: Tensor,
    num_kv_heads: int,
    *,
    max_pages: int,
    min_pages: int = 0,
    top_p: float | None = None,
) -> Tensor:
    batch, heads, pages = log_mass.shape
    log_mass = float32(log_mass)
    page_index = torch.empty(batch, num_kv_heads, min(max_pages, pages), dtype=torch.int64)
    launch(
        cpu_select.select,
        batch * heads * pages // _SELECT_ROWS,
        *(batch * num_kv_heads, heads // num_kv_heads, pages, page_index.shape[2], min_pages),
        *(float(top_p or 0.0), log_mass.data_ptr(), page_index.data_ptr()),
    )
    return page_index


def attend_pages(
    query: Tensor,
    chunks: Sequence[Tensor],
    page_ids: Tensor,
    counts: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    codec: PageCodec | None = None,
) -> tuple[Tensor, Tensor]:
    batch, kv_heads, pages = page_ids.shape
    first, width = chunks[0], query.shape[-1]
    chunk_pages = len(first)
    page_size = first.shape[2] if codec is None else codec.page_size
    # of pages of small integers no dtype is read
    dtype = DTYPE_CODES.get(first.dtype, FLOAT32)
    bits = np.array((0, 0) if codec is None else codec.bits, np.int64)
    query, page_ids, counts = float32(query), page_ids.contiguous(), counts.contiguous()
    out, lse = torch.empty(query.shape), torch.empty(query.shape[:2])
    parts = min(splits(batch * kv_heads, pages * page_size), pages)
    in_range = launch(
        cpu_pages.attend_pages,
        batch * kv_heads * pages * page_size,
        *(batch * kv_heads, parts, query.shape[1] // kv_heads, width, pages, query.data_ptr()),
        *(np.array([chunk.data_ptr() for chunk in chunks], np.int64), chunk_pages, page_size),
        *(dtype, bits, first[0].nbytes, page_ids.data_ptr(), counts.data_ptr()),
        *(np.float32(scale), np.float32(softcap or 0.0), out.data_ptr(), lse.data_ptr()),
    )
    if not in_range:
        raise IndexError(
            f"page_ids must be below {len(chunks) * chunk_pages} and counts in 0..{page_size}, got "
            f"ids up to {int(page_ids.max())}, counts in {int(counts.min())}..{int(counts.max())}"
        )
    return out, lse


def attend_dense(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    batch, kv_heads, tokens, width = keys.shape
    query = float32(query)
    out, lse = torch.empty(query.shape), torch.empty(query.shape[:2])
    if valid is not None:
        valid = valid.contiguous()
    launch(
        cpu_dense.attend_dense,
        batch * kv_heads * tokens,
        *(batch, kv_heads, splits(batch * kv_heads, tokens), query.shape[1] // kv_heads),
        *(width, tokens, query.data_ptr(), view(keys), view(values)),
        *(0 if valid is None else valid.data_ptr(), np.float32(scale), np.float32(softcap or 0.0)),
        *(out.data_ptr(), lse.data_ptr()),
    )
    return out, lse


def merge_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    out_a, lse_a, out_b, lse_b = map(float32, (out_a, lse_a, out_b, lse_b))
    out, lse = torch.empty(out_a.shape), torch.empty(lse_a.shape)
    launch(
        cpu_merge.merge_serial if out.numel() < _MERGE_SERIAL else cpu_merge.merge_parallel,
        lse.numel(),
        *(lse.numel(), out.shape[-1]),
        *(tensor.data_ptr() for tensor in (out_a, lse_a, out_b, lse_b, out, lse)),
    )
    return out, lse


def project(x: Tensor, weight: Tensor) -> Tensor:
    blocks, rows, width = x.shape
    x, weight = x.contiguous(), weight.contiguous()
    scores = torch.empty(blocks, rows)
    launch(
        cpu_project.project,
        blocks * rows,
        *(blocks, rows, width, x.data_ptr(), weight.data_ptr(), scores.data_ptr()),
    )
    return scores


def score_means(
    query: Tensor, codes: Tensor, scale: Tensor, *, num_threads: int | None = None
) -> Tensor:
    heads, num_queries, width = query.shape
    pages = scale.shape[1]
    means = torch.empty(heads, num_queries, pages)
    query = float32(query)
    launch(
        cpu_search.score_means,
        heads * num_queries * pages,
        *(heads, num_queries, width, pages, query.data_ptr(), _part(codes), _part(scale)),
        means.data_ptr(),
        num_threads=num_threads,
    )
    return means


def search_addresses(
    mean_codes: Tensor,
    mean_scale: Tensor,
    spread: Tensor,
    codes: Tensor,
    code_scale: Tensor,
    page_scale: Tensor,
    keys: Tensor,
    ids: Tensor,
    tail: Tensor,
) -> tuple[tuple[int, ...], ...]:
    """The parts of an index in the order of `cpu_search.search_pages`."""
    size, strides, dtype = keys.element_size(), keys.stride(), DTYPE_CODES[keys.dtype]
    parts = mean_codes, mean_scale, spread, codes, code_scale, page_scale
    return (
        *(_part(x) for x in parts),
        (*_part(keys), dtype, size * strides[1], size * strides[2]),
        _part(ids),
        (*_part(tail), dtype, tail.shape[1], size * tail.stride(1)),
    )


def search_pages(
    query: Tensor,
    turned: Tensor,
    given: Tensor | None,
    parts: SearchParts,
    *,
    k: int,
    max_pages: int,
    num_candidates: int,
    optimism: float,
    num_threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, num_queries, width = query.shape
    pages, page_size = parts.keys.shape[1:3]
    query, turned = query.contiguous(), turned.contiguous()
    if given is not None:
        given = given.contiguous()
    most = min(pages, max_pages) if given is None else given.shape[2]
    scores = torch.empty(heads, num_queries, k)
    found = torch.empty(heads, num_queries, k, dtype=torch.int64)
    work = torch.empty(4, heads, num_queries, dtype=torch.int64)
    launch(
        cpu_search.search_pages,
        heads * num_queries * (pages + most * page_size + parts.tail.shape[1]),
        *(heads, num_queries, width, turned.shape[2], 8 * parts.codes.shape[2], page_size, pages),
        *(most, num_candidates, k, np.float32(optimism), query.data_ptr(), turned.data_ptr()),
        *(0 if given is None else given.data_ptr(), *parts.addresses),
        *(scores.data_ptr(), found.data_ptr(), work.data_ptr()),
        num_threads=num_threads,
    )
    return scores, found, work


def _part(tensor: Tensor) -> tuple[int, int]:
    """Address, and bytes from head to head, of an index part [H, ...]."""
    return tensor.data_ptr(), tensor.stride(0) * tensor.element_size()
