"""What one layer did since it was made: plain sums, kept on the device until somebody asks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class StepChoice(NamedTuple):
    """What a retrieval step decided."""

    log_mass: Tensor
    """[B, Hq, N] estimated log mass of each page."""
    chosen: Tensor
    """[B, Hkv, M] pages retrieved, -1 padded."""


@dataclass(slots=True)
class Counters:
    """Sums over decode steps. `retrieved_share` and `tail_mass` are means over heads, summed."""

    steps: int = 0
    retrieved_share: Tensor | float = 0.0
    tail_mass: Tensor | float = 0.0
    bytes_to_host: int = 0
    bytes_to_device: int = 0
    host_wanted: int = 0
    """Pages that steps wanted from the host, and of those the ones that were on the disk."""
    host_missing: int = 0
    pool_wanted: int = 0
    """Pages that captured steps chose, and of those the ones that were not on the device."""
    pool_missing: int = 0
    num_late: int = 0
    """Pages that captured steps chose and did not wait for."""
    last_query: Tensor | None = None
    """[B, Hq, D] of the last decode step, in any mode."""
    last_choice: StepChoice | None = None

    def record_step(
        self, retrieved_tokens: Tensor, num_tokens: int, tail_lse: Tensor, total_lse: Tensor
    ) -> None:
        """Add a step. retrieved_tokens: [B, Hkv]; tail_lse, total_lse: [B, Hq]."""
        self.steps += 1
        self.retrieved_share = self.retrieved_share + retrieved_tokens.float().mean() / num_tokens
        # a sequence that is all padding has no mass at all
        share = torch.exp(tail_lse - total_lse).nan_to_num(nan=0.0)
        self.tail_mass = self.tail_mass + share.mean()

    def copy(self) -> Counters:
        """The same sums, free to go on by themselves."""
        return replace(self, last_query=None, last_choice=None)
