"""What a decode step can derive of pages that are not refined, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from wavekv.kernels.page_index import PageIndex
from wavekv.kernels.reference_levels import moments
from wavekv.kernels.step import StepScratch, StepShape


def mixed_query(scratch: StepScratch) -> tuple[Tensor, Tensor]:
    """The mixed query as `wavekv.kernels.levels` has it."""
    return scratch.query_words.view(torch.int8), scratch.query_step[..., 0]


def by_moments(index: PageIndex, scratch: StepScratch, shape: StepShape) -> tuple[Tensor, Tensor]:
    """Log mass and shift [B, Hq, n] of the n pages of an index."""
    n, (B, H) = index.counts.shape[2], index.counts.shape[:2]
    return moments(
        mixed_query(scratch),
        scratch.block_logits[..., : n // shape.block_pages],
        scratch.query_square.view(B, H, -1),
        index,
        shape.softcap,
        use_variance=shape.tail == "second",
    )


def shift_of_pages(index: PageIndex, scratch: StepScratch, shape: StepShape) -> Tensor:
    """[B, Hq, n] of pages that are not refined."""
    if shape.softcap is not None:
        return scratch.shift[..., : index.counts.shape[2]]
    return by_moments(index, scratch, shape)[1]
