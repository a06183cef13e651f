"""What goes wrong with saved contexts in stores."""

from __future__ import annotations

from dataclasses import dataclass

from wavekv.errors import WavekvError


class RemoteError(WavekvError, OSError):
    """Raised when a store, or what is in it, is not as an operation needs it."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A file of a context that is not as its manifest says."""

    file: str
    field: str
    """"bytes", "crc32", or "file": whether it is there."""
    expected: str
    got: str

    def __str__(self) -> str:
        return f"{self.file}: expected {self.field} {self.expected}, got {self.got}"


class DamagedError(RemoteError):
    """Raised when a file of a context is not as its manifest says."""

    def __init__(self, where: str, problem: Problem) -> None:
        super().__init__(
            f"expected {where} as its manifest says, got {problem.file} with {problem.field} "
            f"{problem.got} instead of {problem.expected}; take another copy of this context"
        )
        self.problem = problem
