"""A predicted time and what it is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Prediction:
    """In seconds."""

    seconds: float
    floor: float
    """What bytes or operations take at the measured rates."""
    parts: dict[str, float]
    """By what it goes to. Those that run beside others are not in the sum."""
    how: str

    @property
    def factor(self) -> float:
        """The prediction as a multiple of the floor."""
        return self.seconds / self.floor

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "seconds": self.seconds,
            "floor_seconds": self.floor,
            "factor": self.factor,
            "parts": self.parts,
            "how": self.how,
        }
