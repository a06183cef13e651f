"""The kernels over an index of two levels for CPU tensors: unwrap them, launch numba.

Arguments are taken as validated by `levels`; the index is read in place.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from wavekv.kernels import cpu_level_estimate, cpu_level_refine, cpu_level_score
from wavekv.kernels.cpu_launch import float32, launch, splits, view
from wavekv.kernels.mixing import mixing_on
from wavekv.kernels.page_index import PageIndex
from wavekv.kernels.planes import num_words, step_table
from wavekv.kernels.reference_levels import Mixed

_CPU = torch.device("cpu")


def score_levels(
    query: Tensor,
    index: PageIndex,
    *,
    scale: float,
    softcap: float | None = None,
    use_variance: bool = True,
) -> tuple[Tensor, Tensor, Mixed, Tensor]:
    batch, kv_heads, pages = index.counts.shape
    heads, width = query.shape[1:]
    query = float32(query)
    codes = torch.empty(batch, heads, 32 * num_words(width, 1), dtype=torch.int8)
    worth = torch.empty(batch, heads)
    log_mass, shift, logits = (torch.empty(batch, heads, pages) for _ in range(3))
    blocks = pages // index.block_pages
    parts = index.counts, index.variance, index.mean, index.mean_step
    launch(
        cpu_level_score.score,
        batch * kv_heads * pages,
        *(batch, kv_heads, min(splits(batch * kv_heads, pages), max(1, blocks))),
        *(heads // kv_heads, width, codes.shape[2], blocks, index.block_pages),
        *(query.data_ptr(), mixing_on(_CPU, width).data_ptr(), step_table(_CPU).data_ptr()),
        *(*(view(_with_rows(part)) for part in parts), view(index.block_mean)),
        *(view(_with_rows(index.block_mean_scale)), use_variance),
        *(np.float32(scale), np.float32(softcap or 0.0)),
        *(log_mass.data_ptr(), shift.data_ptr(), logits.data_ptr()),
        *(codes.data_ptr(), worth.data_ptr()),
    )
    return log_mass, shift, (codes, worth), logits


def refine_levels(
    mixed: Mixed,
    logits: Tensor,
    index: PageIndex,
    log_mass: Tensor,
    shift: Tensor,
    candidates: Tensor,
    *,
    use_low: bool,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    batch, kv_heads, pages = index.counts.shape
    page_size, num_candidates = index.key_step.shape[3], candidates.shape[2]
    codes, worth = (part.contiguous() for part in mixed)
    candidates, logits = candidates.contiguous(), float32(logits)
    refined, shifted = (
        x.float().clone(memory_format=torch.contiguous_format) for x in (log_mass, shift)
    )
    launch(
        cpu_level_refine.refine,
        batch * kv_heads * num_candidates * page_size,
        *(batch, kv_heads, splits(batch * kv_heads, num_candidates * page_size)),
        *(codes.shape[1] // kv_heads, index.block_mean.shape[3], codes.shape[2], page_size),
        *(pages, num_candidates, codes.data_ptr(), worth.data_ptr(), step_table(_CPU).data_ptr()),
        *(logits.data_ptr(), view(_with_rows(index.counts)), view(index.high), view(index.low)),
        *(view(index.key_step), use_low, candidates.data_ptr(), np.float32(softcap or 0.0)),
        *(refined.data_ptr(), shifted.data_ptr()),
    )
    return refined, shifted


def estimate_levels(
    log_mass: Tensor,
    index: PageIndex,
    selected: Tensor,
    refined: Tensor,
    shift: Tensor | None = None,
    slope: Tensor | None = None,
    *,
    span_pages: int = 1,
) -> tuple[Tensor, Tensor]:
    batch, kv_heads, pages = index.counts.shape
    heads, width = log_mass.shape[1], index.block_mean.shape[3]
    blocks = pages // index.block_pages
    log_mass, selected, refined = float32(log_mass), selected.contiguous(), refined.contiguous()
    # named, so that they live as long as the kernel reads at their addresses
    lean = () if shift is None or slope is None else (float32(shift), slope.contiguous())
    out, lse = torch.empty(batch, heads, width), torch.empty(batch, heads)
    launch(
        cpu_level_estimate.estimate,
        batch * kv_heads * pages,
        *(batch, kv_heads, min(splits(batch * kv_heads, pages), max(1, blocks))),
        *(heads // kv_heads, width, blocks, index.block_pages, log_mass.data_ptr()),
        *(view(index.value), view(_with_rows(index.value_step)), view(index.block_value)),
        *(view(_with_rows(index.block_value_scale)), step_table(_CPU).data_ptr()),
        *(mixing_on(_CPU, width).data_ptr(), selected.data_ptr(), selected.shape[2]),
        *(refined.data_ptr(), refined.shape[2]),
        *(tuple(tensor.data_ptr() for tensor in lean) or (0, 0)),
        *(span_pages, out.data_ptr(), lse.data_ptr()),
    )
    return out, lse


def _with_rows(part: Tensor) -> Tensor:
    """[B, Hkv, N] as rows of one number, which have a view."""
    return part.unsqueeze(-1)
