"""Numbers of tokens as people write them."""

from __future__ import annotations

import re

from wavekv.errors import ConfigError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}


def parse_tokens(text: str) -> int:
    """Tokens of "100000", "128K" = 131072 or "1M" = 1048576.

    Raises:
        ConfigError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KM]?)\s*", text, re.IGNORECASE)
    count = 0.0 if match is None else float(match[1]) * _UNITS[match[2].upper()]
    if count < 1 or count != int(count):
        raise ConfigError(f"tokens must look like 100000, 128K or 1M, got {text!r}")
    return int(count)


def tokens_text(tokens: int) -> str:
    """The shortest of the forms that `parse_tokens` reads."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if tokens and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)
