"""What one system of the decode benchmark took, in time and memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Result:
    """One system at one context length; without times where it could not run (see `notes`)."""

    name: str
    tokens: int
    batch: int
    ms_median: float | None = None
    ms_p10: float | None = None
    ms_p99: float | None = None
    repeats: int = 0
    device_bytes: int = 0
    """What the system needs on the device: its peak, and what it would hold had all of it fit."""
    host_bytes: int = 0
    bytes_read: int = 0
    """Bytes of device memory that a step must read: its floor."""
    kv_buffers: int | None = None
    """Distinct pairs of keys and values in device memory, where layers may share them."""
    notes: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    """What only some systems have to say; JSON-ready."""

    @classmethod
    def of_times(cls, name: str, tokens: int, batch: int, times: list[float], **fields) -> Result:
        """From the milliseconds of every step; `fields` are the other fields."""
        low, middle, high = (float(q) for q in np.percentile(times, (10, 50, 99)))
        return cls(name, tokens, batch, middle, low, high, len(times), **fields)

    def times_floor(self, bandwidth: float) -> float | None:
        """How many times as long as reading `bytes_read` at so many bytes a second."""
        if self.ms_median is None or not self.bytes_read:
            return None
        return 1e-3 * self.ms_median * bandwidth / self.bytes_read
