"""The choice of pages on given log masses, and what it must be."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from pool_model import UNWRITTEN
from torch import Tensor

from wavekv.kernels import step_reference
from wavekv.kernels.means import KEY_BITS, pack_rows
from wavekv.kernels.page_index import PageIndex, empty_index
from wavekv.kernels.step import (
    ATTENDED,
    BIN_SHIFT,
    CANDIDATES,
    FINAL,
    FINALISTS,
    FIRST,
    LEAST,
    MOST,
    NUM_LIMITS,
    SECOND,
    WIDE,
    StepPages,
    StepShape,
    StepSteady,
    bin_base,
    empty_scratch,
)

DIGITS, MOST_HEADS = 3, 8
"""Seven-bit digits of a log mass, and heads of a group whose digits fit a page's mean."""
D = DIGITS * MOST_HEADS
CLOSE = 1e-5
"""Shares are sums in float32: where top_p falls this close to one, either choice is right."""


class Limits(NamedTuple):
    """How many pages to choose."""

    most: int
    least: int = 1
    wide: int = 0
    """0: as many as the most, and no wide choice."""
    top_p: float | None = None
    candidates: int = 0


def in_digits(log_mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Digits [B, Hkv, n, D] int8 and scale [B, Hkv, n] of log masses [B, Hkv, G, n], and what these
    hold of them: exactly a float32."""
    masses = log_mass.mT.double()
    scale = pack_rows(masses, KEY_BITS)[1].double().unsqueeze(-1)
    rest, parts = masses / scale, []
    for _ in range(DIGITS):
        parts.append(rest.round())
        rest = 128 * (rest - parts[-1])
    digits = torch.stack(parts, -1)
    weights = torch.tensor([128.0**-j for j in range(DIGITS)], dtype=torch.float64)
    held = ((digits @ weights) * scale).mT.float()
    padded = torch.nn.functional.pad(digits.flatten(3), (0, D - DIGITS * log_mass.shape[2]))
    return padded.to(torch.int8), scale.squeeze(-1).float(), held


class Selection:
    """The kernels of a step from the scores to the chosen pages, on log masses that are given.

    The mean of a page holds the digits of its log mass for each head of the group, which the
    head's query adds up; of a page without tokens it is -inf for all."""

    def __init__(
        self,
        ops: ModuleType,
        device: str,
        log_mass: Tensor,
        is_empty: Tensor,
        limits: Limits,
        spare: int = 0,
    ) -> None:
        """log_mass: [B, Hkv, G, n]; is_empty: [B, Hkv, n] bool."""
        B, H, G, n = log_mass.shape
        assert G <= MOST_HEADS
        N = n + spare
        self.ops, self.num_pages, self.limits = ops, n, limits
        self.num_finalists = -(-limits.candidates // 4)
        digits, scale, held = in_digits(log_mass.masked_fill(is_empty.unsqueeze(2), 0.0))
        self.log_mass = held.masked_fill(is_empty.unsqueeze(2), -torch.inf)
        most = min(limits.most, N)
        self.shape = StepShape(
            batch=B,
            kv_heads=H,
            group=G,
            head_dim=D,
            page_size=1,
            capacity=N,
            most=most,
            slots=most,
            misses=most,
            sinks=0,
            ring=8,
            span_pages=16,
            block_pages=1,
            scale=1.0,
            top_p=limits.top_p,
            tail="first",
            is_wide=limits.wide > 0,
        )
        values = torch.zeros(NUM_LIMITS, dtype=torch.int32)
        values[LEAST], values[MOST] = limits.least, most
        values[WIDE], values[CANDIDATES] = limits.wide or most, limits.candidates
        values[FINALISTS] = self.num_finalists
        self.values = values.to(device)
        self.counters = torch.tensor([8, 8, n, 0], dtype=torch.int32, device=device)
        weights = torch.tensor([128.0**-j for j in range(DIGITS)])
        heads = torch.block_diag(*[weights] * MOST_HEADS)[:G]
        self.query = heads.repeat(B, H, 1).to(device)
        # what is beyond the pages in use, or belongs to an empty one, must not matter
        empty = empty_index(torch.zeros(B, H, 0, D), page_size=1, block_pages=1)
        parts = [x.new_full((B, H, N, *x.shape[3:]), 77) for x in empty]
        summary = PageIndex._make(parts)
        # a block of one page has its mean
        summary.block_mean[:, :, :n] = digits
        summary.block_mean_scale[..., :n] = scale
        summary.mean_step[..., :n] = summary.key_step[:, :, :n] = 0
        summary.counts[..., :n] = ~is_empty
        summary = PageIndex._make(part.to(device) for part in summary)
        pages = torch.zeros(B, H, 1, 2, D, D), torch.zeros(B, H, N, dtype=torch.int64)
        self.pages = StepPages(summary, *(part.to(device) for part in pages))
        zone = torch.zeros(B, H, 8, D, device=device)
        self.steady = StepSteady(zone, zone, torch.zeros(B, 8, dtype=torch.bool, device=device))
        scratch = empty_scratch(self.shape, torch.float32, torch.device(device))
        for part in scratch:
            if part.dtype.is_floating_point:
                part.fill_(torch.nan)
            elif part.dtype in (torch.int32, torch.int64):
                part.fill_(UNWRITTEN)
        scratch.status.fill_(77)
        self.narrow_memory, narrow = guarded(B, H, self.shape.most, n, device)
        self.wide_memory, self.wide = guarded(B, H, limits.wide, n, device)
        self.scratch = scratch._replace(chosen=narrow)

    def rank(self) -> None:
        """Up to the final ranks. Candidates have codes that say nothing new."""
        shape, scratch = self.shape, self.scratch
        self.ops.score(
            self.query, None, None, None, self.steady, self.pages, self.counters, scratch, shape
        )
        self.stages = []
        for stage in FIRST, SECOND, FINAL:
            pages, counters = self.pages, self.counters
            self.ops.rank_pages(pages, counters, self.values, scratch, shape, stage=stage)
            self.stages.append(self.bits())
            if stage != FINAL:
                self.ops.refine(pages, counters, scratch, shape, stage=stage)

    def select(self) -> None:
        self.ops.select(self.counters, self.values, self.scratch, self.shape)
        if self.limits.wide:
            self.ops.pick(
                self.counters, self.values, self.scratch, self.wide, self.shape, wide=True
            )

    def bits(self) -> list[list[int]]:
        """[rows, n] ranks of pages in use."""
        bits: list[list[int]] = self.scratch.rank[..., : self.num_pages].flatten(0, 1).tolist()
        return bits

    def check_ranks(self) -> None:
        """All rankings, and what they say is worth a look."""
        expected = expected_ranks(self.log_mass)
        bins_from = bin_base(self.shape.group)
        wanted = (self.limits.candidates, self.num_finalists, int(self.values[WIDE]))
        needless = not self.limits.candidates or self.shape.most >= self.num_pages
        for number, every in enumerate(self.stages):
            thresholds = self.scratch.threshold[number].flatten().tolist()
            for bits, ranks, least in zip(every, expected, thresholds, strict=True):
                assert [x < 0 for x in bits] == [x < 0 for x in ranks.tolist()]
                assert all(x >= -1 for x in bits)
                found = np.array(bits, dtype=np.int32).clip(0).view(np.float32)
                np.testing.assert_allclose(found, ranks.clip(0), rtol=1e-4, atol=1e-36)
                if number != FINAL and needless:
                    assert least == 0x7FFFFFFF
                    continue
                # the bin of the last one wanted, whole; of the lowest bin all
                alive = [x for x in bits if x >= 0]
                assert sum(x >= least for x in alive) >= min(wanted[number], len(alive))
                assert least == 0 or least & ((1 << BIN_SHIFT) - 1) == 0
                if number != FIRST and not needless and self.ops is not step_reference:
                    # only pages that were candidates are counted: the bin may be a lower one
                    continue
                bin_end = (bins_from + 1 if least == 0 else (least >> BIN_SHIFT) + 1) << BIN_SHIFT
                assert sum(x >= bin_end for x in alive) < wanted[number]

    def check_chosen(self) -> None:
        """What is chosen is what a sort by rank would choose."""
        assert not (self.scratch.status[..., : self.num_pages] == ATTENDED).any()
        top_p, limits, G = self.limits.top_p, self.limits, self.shape.group
        narrow = unguarded(self.narrow_memory, self.scratch.chosen)
        wide = unguarded(self.wide_memory, self.wide)
        for bits, few, many in zip(self.bits(), narrow, wide, strict=True):
            # of equal ranks the lower page goes first
            order = [n for _, n in sorted((-x, n) for n, x in enumerate(bits) if x >= 0)]
            best = order[: self.shape.most]
            fewest = len(best)
            if top_p is not None:
                shares = np.array([bits[n] for n in best], dtype=np.int32).view(np.float32)
                before = np.cumsum(shares.astype(np.float64)) - shares
                fewest, most = (
                    max(int((before < top_p * G + close * G).sum()), min(limits.least, len(best)))
                    for close in (-CLOSE, CLOSE)
                )
                best = best[:most]
            count = sum(page >= 0 for page in few)
            assert fewest <= count <= len(best)
            assert few == sorted(best[:count]) + [-1] * (len(few) - count)
            if limits.wide:
                best = sorted(order[: limits.wide])
                assert many == best + [-1] * (len(many) - len(best))
                assert set(few) <= {-1, *best}


def guarded(B: int, H: int, M: int, spare: int, device: str) -> tuple[Tensor, Tensor]:
    """Memory, and a view [B, Hkv, M] of its middle."""
    memory = torch.full((spare + B * H * M + spare,), UNWRITTEN, dtype=torch.int32, device=device)
    return memory, memory[spare : spare + B * H * M].view(B, H, M)


def unguarded(memory: Tensor, chosen: Tensor) -> list[list[int]]:
    """The chosen pages of each row, if nothing was written beside them."""
    spare = (len(memory) - chosen.numel()) // 2
    assert (memory[:spare] == UNWRITTEN).all()
    assert (memory[len(memory) - spare :] == UNWRITTEN).all()
    rows: list[list[int]] = chosen.flatten(0, 1).tolist()
    return rows


def expected_ranks(log_mass: Tensor) -> np.ndarray:
    """[rows, n] float64: the sum of the shares that heads of a group give; -1 for empty pages."""
    mass = log_mass.flatten(0, 1).double().numpy()
    if mass.shape[2] == 0:
        return np.zeros((mass.shape[0], 0))
    largest = mass.max(2, keepdims=True)
    weights = np.exp(mass - np.where(np.isinf(largest), 0.0, largest))
    ranks = (weights / np.maximum(weights.sum(2, keepdims=True), 1e-300)).sum(1)
    return np.where(np.isinf(mass).all(1), -1.0, ranks)


def check_selection(selection: Selection) -> None:
    selection.rank()
    selection.check_ranks()
    selection.select()
    selection.check_chosen()
