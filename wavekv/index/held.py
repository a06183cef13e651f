"""The state that an index holds: until it is closed, and to change only where it is in memory."""

from __future__ import annotations

from wavekv.errors import ClosedError, ReadOnlyError
from wavekv.index.state import IndexState


class HeldState:
    """A state that can be freed, and that may be one to read only."""

    def __init__(self, state: IndexState, *, is_read_only: bool) -> None:
        """is_read_only: the state is mapped from a file."""
        self._state: IndexState | None = state
        self._is_read_only = is_read_only

    @property
    def is_open(self) -> bool:
        """It is not freed yet."""
        return self._state is not None

    @property
    def readable(self) -> IndexState:
        """The state, to read.

        Raises:
            ClosedError: after `free`.
        """
        if self._state is None:
            raise ClosedError("expected an open index, got one after close(); load it again")
        return self._state

    @property
    def writable(self) -> IndexState:
        """The state, to change.

        Raises:
            ClosedError: after `free`.
            ReadOnlyError: it is mapped from a file.
        """
        state = self.readable
        if self._is_read_only:
            raise ReadOnlyError(
                "expected an index in memory, got one that is mapped from its file; "
                "load it with mmap=False to change it"
            )
        return state

    def free(self) -> None:
        """Let go of the state; more than once does no harm."""
        self._state = None
