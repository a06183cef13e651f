"""How many tokens the index of a CUDA device has room for beyond those that it holds (pure)."""

from __future__ import annotations

from wavekv.config import OffloadConfig

ROOM_TOKENS = 8192
"""At most, but for long append segments. Then the buffers are made anew, with as much room again;
doubling would take twice the memory of an index that is most of what a context takes."""


def room_tokens(config: OffloadConfig) -> int:
    """Tokens that room is made for at once."""
    return max(ROOM_TOKENS, 2 * config.append_segment)
