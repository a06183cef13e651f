"""The steady zone of one layer: sink tokens and the latest tokens, exact and on the device.

One dense buffer holds both, sinks first, so that a step attends to them in one pass. The sink part
is empty until tokens leave for pages; then each sequence's first valid tokens move into it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wavekv.growing import GrowingTensor


class SteadyZone:
    """Keys and values [B, Hkv, A + L, D]: A sink slots, then L tokens from position `start` on."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """keys, values: [B, Hkv, 0, D] fix shape, dtype and device."""
        batch, device = keys.shape[0], keys.device
        self.keys = GrowingTensor(keys, dim=2)
        self.values = GrowingTensor(values, dim=2)
        self.valid = GrowingTensor(torch.empty(batch, 0, dtype=torch.bool, device=device), dim=1)
        self.sink_positions = torch.empty(batch, 0, dtype=torch.int64, device=device)
        self.start = 0
        self.has_gaps = False
        """Some slots hold no token for good: padding, or sinks that were cropped away."""
        self.is_ragged = False
        """`has_gaps`, or local slots that sinks left behind."""

    @property
    def num_sink_slots(self) -> int:
        """Slots A in front of the local tokens."""
        return self.sink_positions.shape[1]

    @property
    def num_local(self) -> int:
        """Local tokens L, padding included."""
        return len(self.keys) - self.num_sink_slots

    @property
    def end(self) -> int:
        """The position that the next token takes."""
        return self.start + self.num_local

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def mask(self) -> Tensor | None:
        """[B, A + L] bool of slots that hold a token; None if all do."""
        return self.valid.view if self.is_ragged else None

    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        """Add tokens at the end. keys, values: [B, Hkv, T, D]; valid: [B, T] or None for all."""
        self.keys.append(keys)
        self.values.append(values)
        if valid is None:
            valid = torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool, device=keys.device)
        else:
            self.has_gaps = self.is_ragged = True
        self.valid.append(valid)

    def local(self, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """(keys, values, valid) of `count` local tokens, `first` after the first: views."""
        at = self.num_sink_slots + first
        return (
            self.keys.view.narrow(2, at, count),
            self.values.view.narrow(2, at, count),
            self.valid.view.narrow(1, at, count),
        )

    def fill_sinks(self, num_slots: int) -> None:
        """Move each sequence's first `num_slots` valid tokens into sink slots, where they stay.

        Sequences that have sinks already keep them: one whose padding outlasts the first segment
        gets its sinks later than the others.
        """
        if num_slots == 0 or (self.num_sink_slots and not self.has_gaps):
            return
        if self.num_sink_slots == 0:
            self._open_slots(num_slots)
        keys, values, valid = self.local(0, self.num_local)
        # [B, A]: the first valid tokens, in order
        chosen = torch.sort((~valid).to(torch.int8), dim=1, stable=True).indices[:, :num_slots]
        lacking = ~self.valid.view[:, :num_slots].any(1, keepdim=True)
        filled = valid.gather(1, chosen) & lacking
        rows = chosen[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        for part, local in ((self.keys, keys), (self.values, values)):
            slots = part.view[:, :, :num_slots]
            slots.copy_(torch.where(filled[:, None, :, None], local.gather(2, rows), slots))
        self.sink_positions = torch.where(filled, chosen + self.start, self.sink_positions)
        self.valid.view[:, :num_slots].logical_or_(filled)
        valid.scatter_(1, chosen, valid.gather(1, chosen) & ~filled)
        self.is_ragged = True

    def drop_oldest(self, count: int) -> None:
        """Forget the first `count` local tokens: they live in pages now."""
        for part in (self.keys, self.values, self.valid):
            part.drop(self.num_sink_slots, count)
        self.start += count
        # the slots that sinks left behind are gone too
        self.is_ragged = self.has_gaps

    def truncate(self, end: int) -> None:
        """Forget tokens at positions >= `end` (>= start)."""
        for part in (self.keys, self.values, self.valid):
            part.truncate(self.num_sink_slots + end - self.start)
        # sinks of a sequence with long padding, or of one whose pages failed, may be that recent
        if self.is_ragged:
            self._forget_sinks(end)

    def restart(self, start: int, end: int, keys: Tensor, values: Tensor, valid: Tensor) -> None:
        """Replace the local tokens by [start, end), and forget sinks at positions >= `end`.

        keys, values: [B, Hkv, end - start, D]; valid: [B, end - start].
        """
        slots = self.num_sink_slots
        for part in (self.keys, self.values, self.valid):
            part.truncate(slots)
        self._forget_sinks(end)
        gaps = self.has_gaps
        self.start = start
        self.append(keys, values, valid)
        # without gaps before, the only ones now are those that sinks left
        self.has_gaps = gaps

    def select(self, index: Tensor) -> None:
        """Keep the sequences `index` [B'], in that order."""
        for part in (self.keys, self.values, self.valid):
            part.select(index)
        self.sink_positions = self.sink_positions[index.to(self.sink_positions.device)]

    def clone(self) -> SteadyZone:
        """An independent copy."""
        copy = object.__new__(SteadyZone)
        copy.keys, copy.values = self.keys.clone(), self.values.clone()
        copy.valid = self.valid.clone()
        copy.sink_positions = self.sink_positions
        copy.start, copy.is_ragged = self.start, self.is_ragged
        copy.has_gaps = self.has_gaps
        return copy

    def _forget_sinks(self, end: int) -> None:
        gone = self.sink_positions >= end
        if bool(gone.any()):
            self.sink_positions = self.sink_positions.masked_fill(gone, -1)
            self.valid.view[:, : self.num_sink_slots].logical_and_(~gone)
            self.has_gaps = self.is_ragged = True

    def _open_slots(self, num_slots: int) -> None:
        batch = self.sink_positions.shape[0]
        self.sink_positions = self.sink_positions.new_full((batch, num_slots), -1)
        for part in (self.keys, self.values, self.valid):
            part.insert_front(num_slots)
