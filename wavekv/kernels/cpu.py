"""The public functions for CPU tensors: unwrap the torch tensors, launch the numba kernels.

Arguments are taken as validated by `dispatch`. Pages, keys and statistics are read in place.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from wavekv.kernels import (
    cpu_dense,
    cpu_estimate,
    cpu_merge,
    cpu_pages,
    cpu_refine,
    cpu_score,
    cpu_select,
)
from wavekv.kernels.cpu_math import BFLOAT16, FLOAT16, FLOAT32

_DTYPE_CODES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
_NO_VIEW = (0, 0, 0, 0, 0)

# numba's workqueue threading layer crashes when two threads launch at once.
_LAUNCH = threading.Lock()

# numba's OpenMP layer shares libgomp with torch, and as it starts (here) it sets torch's thread
# count.
_torch_threads = torch.get_num_threads()
numba.get_num_threads()
torch.set_num_threads(_torch_threads)

# A launch is cut into at most so many tasks (more where there are more heads), enough to keep a
# large machine busy, and each task gets at least so many rows, enough to pay for joining it.
_MAX_TASKS = 128
_MIN_ROWS = 256

# Selecting costs about as much for so many log masses as the other kernels cost for one row.
_SELECT_ROWS = 16

# States of fewer floats than this are merged on the calling thread.
_MERGE_SERIAL = 1 << 16


def score(
    query: Tensor,
    mean: Tensor,
    variance: Tensor | None,
    counts: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    batch, kv_heads, pages, width = mean.shape
    query = _float32(query)
    log_mass, shift = (torch.empty(batch, query.shape[1], pages) for _ in range(2))
    _launch(
        cpu_score.score,
        batch * kv_heads * pages,
        *(batch, kv_heads, _splits(batch * kv_heads, pages), query.shape[1] // kv_heads),
        *(width, pages, query.data_ptr(), _view(mean)),
        *(_NO_VIEW if variance is None else _view(variance), _view(counts)),
        *(np.float32(scale), np.float32(softcap or 0.0), log_mass.data_ptr(), shift.data_ptr()),
    )
    return log_mass, shift


def refine(
    query: Tensor,
    log_mass: Tensor,
    shift: Tensor,
    mean: Tensor,
    codes: Tensor,
    code_scale: Tensor,
    page_scale: Tensor,
    counts: Tensor,
    candidates: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    batch, kv_heads, pages, width = mean.shape
    page_size, num_candidates = code_scale.shape[3], candidates.shape[2]
    query, candidates = _float32(query), candidates.contiguous()
    refined, shifted = (
        x.float().clone(memory_format=torch.contiguous_format) for x in (log_mass, shift)
    )
    _launch(
        cpu_refine.refine,
        batch * kv_heads * num_candidates * page_size,
        *(batch, kv_heads, _splits(batch * kv_heads, num_candidates * page_size)),
        *(query.shape[1] // kv_heads, width, page_size, pages, num_candidates, query.data_ptr()),
        *(_view(mean), _view(codes), _view(code_scale), _view(page_scale), _view(counts)),
        *(candidates.data_ptr(), np.float32(scale), np.float32(softcap or 0.0)),
        *(refined.data_ptr(), shifted.data_ptr()),
    )
    return refined, shifted


def select(
    log_mass: Tensor,
    num_kv_heads: int,
    *,
    max_pages: int,
    min_pages: int = 0,
    top_p: float | None = None,
) -> Tensor:
    batch, heads, pages = log_mass.shape
    log_mass = _float32(log_mass)
    page_index = torch.empty(batch, num_kv_heads, min(max_pages, pages), dtype=torch.int64)
    _launch(
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
) -> tuple[Tensor, Tensor]:
    batch, kv_heads, pages = page_ids.shape
    chunk_pages, _, page_size, width = chunks[0].shape
    query, page_ids, counts = _float32(query), page_ids.contiguous(), counts.contiguous()
    out, lse = torch.empty(query.shape), torch.empty(query.shape[:2])
    splits = min(_splits(batch * kv_heads, pages * page_size), pages)
    in_range = _launch(
        cpu_pages.attend_pages,
        batch * kv_heads * pages * page_size,
        *(batch * kv_heads, splits, query.shape[1] // kv_heads, width, pages, query.data_ptr()),
        *(np.array([chunk.data_ptr() for chunk in chunks], np.int64), chunk_pages, page_size),
        *(_DTYPE_CODES[chunks[0].dtype], page_ids.data_ptr(), counts.data_ptr()),
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
    query = _float32(query)
    out, lse = torch.empty(query.shape), torch.empty(query.shape[:2])
    if valid is not None:
        valid = valid.contiguous()
    _launch(
        cpu_dense.attend_dense,
        batch * kv_heads * tokens,
        *(batch, kv_heads, _splits(batch * kv_heads, tokens), query.shape[1] // kv_heads),
        *(width, tokens, query.data_ptr(), _view(keys), _view(values)),
        *(0 if valid is None else valid.data_ptr(), np.float32(scale), np.float32(softcap or 0.0)),
        *(out.data_ptr(), lse.data_ptr()),
    )
    return out, lse


def estimate(
    log_mass: Tensor,
    value_mean: Tensor,
    selected: Tensor,
    shift: Tensor | None = None,
    slope: Tensor | None = None,
    *,
    span_pages: int = 1,
) -> tuple[Tensor, Tensor]:
    batch, kv_heads, pages, width = value_mean.shape
    log_mass, selected = _float32(log_mass), selected.contiguous()
    # named, so that they live as long as the kernel reads at their addresses
    lean = () if shift is None or slope is None else (_float32(shift), slope.contiguous())
    heads = log_mass.shape[1]
    out, lse = torch.empty(batch, heads, width), torch.empty(batch, heads)
    _launch(
        cpu_estimate.estimate,
        batch * kv_heads * pages,
        *(batch, kv_heads, _splits(batch * kv_heads, pages), heads // kv_heads, width, pages),
        *(log_mass.data_ptr(), _view(value_mean), selected.data_ptr(), selected.shape[2]),
        *(tuple(tensor.data_ptr() for tensor in lean) or (0, 0)),
        *(span_pages, out.data_ptr(), lse.data_ptr()),
    )
    return out, lse


def merge_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    out_a, lse_a, out_b, lse_b = map(_float32, (out_a, lse_a, out_b, lse_b))
    out, lse = torch.empty(out_a.shape), torch.empty(lse_a.shape)
    _launch(
        cpu_merge.merge_serial if out.numel() < _MERGE_SERIAL else cpu_merge.merge_parallel,
        lse.numel(),
        *(lse.numel(), out.shape[-1]),
        *(tensor.data_ptr() for tensor in (out_a, lse_a, out_b, lse_b, out, lse)),
    )
    return out, lse


def _launch(kernel: Callable[..., Any], rows: int, *arguments: Any) -> Any:
    """Run a kernel over so many rows in all, on no more threads than torch uses.

    A small launch stays on the calling thread: waking the others takes longer, and far longer where
    another process holds their cores. numba's own setting is left as it was.
    """
    most = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    with _LAUNCH:
        before = numba.get_num_threads()
        numba.set_num_threads(max(1, min(most, rows // _MIN_ROWS)))
        try:
            return kernel(*arguments)
        finally:
            numba.set_num_threads(before)


def _splits(heads: int, rows: int) -> int:
    """Into how many tasks to cut a KV head's rows: from shapes alone, never the thread count."""
    return max(1, min(rows // _MIN_ROWS, _MAX_TASKS // max(heads, 1)))


def _float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()


def _view(tensor: Tensor) -> tuple[int, int, int, int, int]:
    """Address, dtype code (-1: no floats) and byte strides of the three outer dimensions."""
    size = tensor.element_size()
    stride = tensor.stride()
    code = _DTYPE_CODES.get(tensor.dtype, -1)
    return tensor.data_ptr(), code, stride[0] * size, stride[1] * size, stride[2] * size
