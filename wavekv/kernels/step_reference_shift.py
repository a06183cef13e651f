"""What a decode step can derive of pages that are not refined, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from wavekv.kernels.page_index import PageIndex
from wavekv.kernels.reference_levels import mean_logits, moments
from wavekv.kernels.step import StepScratch, StepShape


def mixed_query(scratch: StepScratch) -> tuple[Tensor, Tensor]:
    """The mixed query as `wavekv.kernels.levels` has it."""
    return scratch.query_words.view(torch.int8), scratch.query_step[..., 0]


def logits_of_means(index: PageIndex, scratch: StepScratch, shape: StepShape) -> Tensor:
    """[B, Hq, n] of the mean keys of the n pages of an index, before a soft cap."""
    at_blocks = scratch.block_logits[..., : index.counts.shape[2] // shape.block_pages]
    return mean_logits(mixed_query(scratch), at_blocks, index)


def by_moments(index: PageIndex, scratch: StepScratch, shape: StepShape) -> tuple[Tensor, Tensor]:
    """Log mass and shift [B, Hq, n] of the n pages of an index."""
    B, H = index.counts.shape[:2]
    return moments(
        logits_of_means(index, scratch, shape),
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
