"""How a cache is laid out and how much of it a step reads: one frozen, validated dataclass."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from wavekv.errors import ConfigError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}

MOST_TOKENS = 255
"""Tokens of a page whose number fits a byte."""

DECODE_FIELDS = ("mode", "budget", "top_p", "min_budget", "refine", "tail_estimate")
"""Fields that only change how a step reads; a fork may set them."""


LAYOUT_FIELDS = (
    "num_sink_tokens",
    "window",
    "page_size",
    "segment",
    "append_segment",
    "host_dtype",
)
"""Fields that say how tokens are laid out in pages; a saved context keeps its own."""


@dataclass(frozen=True, slots=True)
class OffloadConfig:
    """Settings of an offloaded cache. All counts are tokens; budgets are per KV head and step."""

    mode: Literal["retrieval", "exact"] = "retrieval"
    """"retrieval" attends to the best pages and estimates the rest; "exact" attends to all."""
    budget: float | int = 0.02
    """Tokens to retrieve: a float in (0, 1] is a share of the context, an int is a count."""
    top_p: float | None = None
    """Retrieve only the tokens that hold this share of the estimated mass; `budget` is the cap."""
    min_budget: int = 64
    """The floor under a share or `top_p`: short contexts retrieve at least this many tokens. A
    `budget` given as a count goes before it."""
    refine: int = 12
    """Pages ranked again by the codes of their keys, as a multiple of the budget: so many by two
    bits a dimension, a quarter of them by three. They are estimated with their own mean values,
    others with those of their block. 1 reads no codes, and no mean values but those of blocks."""
    tail_estimate: Literal["none", "first", "second"] = "second"
    """What stands for pages not retrieved: nothing, the means of their keys and values, or also
    second moments (the variance of keys, and how values go with keys). Pages are ranked by the same
    estimate (by means for "none")."""
    num_sink_tokens: int = 4
    """First tokens of each sequence that stay in the steady zone."""
    window: int = 64
    """Latest tokens that stay in the steady zone."""
    page_size: int = 8
    """Tokens in a page, the unit of clustering and transfer."""
    segment: int = 8192
    """Stretch of a prompt that is clustered at once: `page_size` times a power of two."""
    append_segment: int = 256
    """Stretch of generated tokens that is clustered at once: `page_size` times a power of two."""
    prefill_chunk: int | None = None
    """Tokens that one forward of a prefill takes. None: 8192 on a CPU; on CUDA 32768, or half or a
    quarter of that where `device_budget` does not hold such chunks."""
    cpu_budget: float | int | str = 0.8
    """Host memory for pages: bytes, "8GiB", or a float share of what is available."""
    disk: str | os.PathLike[str] | None = None
    """A folder for pages over `cpu_budget`: host memory is then a cache of a file in it, which goes
    with the process."""
    disk_budget: float | int | str = 0.8
    """Size of that file: bytes, "80GiB", or a float share of what is free there."""
    disk_deadline: float | None = None
    """Seconds that a layer of a captured step waits for pages from files. Others that it chose are
    estimated in this step and there in a later one. None to wait for all."""
    host_dtype: Literal["model", "int8", "int4", "int4-int2"] = "model"
    """How pages are stored on the host, and cross the bus: in the model's dtype, or keys and values
    as integers of 8 bits, of 4, or of 4 and 2, with a range for each channel of a page: 63, 38 or
    32 % of the bytes of bfloat16 pages of 8 tokens (docs/accuracy.md has what they cost)."""
    device_budget: float | int | str = 0.9
    """All device memory (CUDA) that a cache may take beside the weights of its model: bytes,
    "8GiB", or a float share of what is free or held by the cache already. It holds the index, with
    room for some thousand tokens to come; while a prompt is prefilled also the chunk, the tensors
    of a forward, what builds and streams pages, and as many of its pages as there is room for;
    while steps run their working memory and up to eight budgets of pages. A prefill that does not
    fit, or after which no step would, is an error before it begins."""
    max_misses: int | None = None
    """Pages that a KV head waits for in a captured step. Others that it chose and that are not on
    the device, those of the lowest rank, are estimated in this step and fetched for the next. None
    to wait for all."""
    prefetch: Literal["none", "runners-up", "early"] = "none"
    """What a captured step fetches ahead: nothing, for the next step the best pages that were not
    chosen, or for the next layer the pages that its predicted query chooses."""
    capture: bool = True
    """Whether decode steps on CUDA run as one CUDA graph, where the model allows it."""
    compile: bool = False
    """Whether RMS norms, rotary embeddings and feed-forward blocks (classes named ...MLP) of a
    captured step are compiled with `torch.compile`: faster steps, after some ten seconds of
    compiling in each process. They round in other places than eager ones do."""

    def __post_init__(self) -> None:
        _check_choice("mode", self.mode, ("retrieval", "exact"))
        _check_choice("tail_estimate", self.tail_estimate, ("none", "first", "second"))
        _check_share_or_count("budget", self.budget)
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ConfigError(f"top_p must be a number in (0, 1] or None, got {self.top_p!r}")
        for name in ("page_size", "window", "refine"):
            _check_count(name, getattr(self, name), least=1)
        if self.page_size > MOST_TOKENS:
            raise ConfigError(
                f"page_size must be at most {MOST_TOKENS}, got {self.page_size}: a page's count of "
                "tokens is one byte"
            )
        if self.prefill_chunk is not None:
            _check_count("prefill_chunk", self.prefill_chunk, least=1)
        for name in ("min_budget", "num_sink_tokens"):
            _check_count(name, getattr(self, name), least=0)
        for name in ("segment", "append_segment"):
            _check_segment(name, getattr(self, name), self.page_size)
        if self.append_segment > self.segment:
            raise ConfigError(
                f"append_segment must be at most segment={self.segment}, got {self.append_segment}"
            )
        if self.num_sink_tokens > self.append_segment:
            raise ConfigError(
                f"num_sink_tokens must be at most append_segment={self.append_segment}, "
                f"got {self.num_sink_tokens}"
            )
        _check_choice("host_dtype", self.host_dtype, ("model", "int8", "int4", "int4-int2"))
        parse_size("cpu_budget", self.cpu_budget)
        parse_size("device_budget", self.device_budget)
        parse_size("disk_budget", self.disk_budget)
        if isinstance(self.disk, os.PathLike):
            object.__setattr__(self, "disk", os.fspath(self.disk))
        if self.disk is not None and not isinstance(self.disk, str):
            raise ConfigError(f"disk must be the path of a folder or None, got {self.disk!r}")
        _check_choice("prefetch", self.prefetch, ("none", "runners-up", "early"))
        if self.max_misses is not None:
            _check_count("max_misses", self.max_misses, least=1)
        if self.disk_deadline is not None and not (
            _is_number(self.disk_deadline) and self.disk_deadline >= 0
        ):
            raise ConfigError(
                f"disk_deadline must be seconds >= 0 or None, got {self.disk_deadline!r}"
            )
        for name in ("capture", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")

    def override(self, allowed: tuple[str, ...] | None = None, **changes: Any) -> OffloadConfig:
        """Return a copy with fields changed.

        Raises:
            ConfigError: an unknown field, one outside `allowed`, or a bad value.
        """
        known = tuple(field.name for field in fields(self)) if allowed is None else allowed
        unknown = sorted(set(changes) - set(known))
        if unknown:
            raise ConfigError(f"expected only the settings {', '.join(known)}, got {unknown}")
        return replace(self, **changes)


def parse_size(name: str, size: float | int | str) -> float | int:
    """Return bytes as an int, or a share in (0, 1] as a float.

    Raises:
        ConfigError: neither a positive number of bytes, "8GiB"-like text, nor a share.
    """
    num: object = size
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)\s*", size, re.IGNORECASE)
        if match is None:
            raise ConfigError(f'{name} must look like "8GiB" or "500MB", got {size!r}')
        num = int(float(match[1]) * _UNITS[match[2].upper()])
    is_share = isinstance(num, float) and 0 < num <= 1
    is_count = isinstance(num, int) and not isinstance(num, bool) and num >= 1
    if not (is_share or is_count):
        raise ConfigError(
            f'{name} must be bytes > 0, text such as "8GiB", or a float share in (0, 1], '
            f"got {size!r}"
        )
    assert isinstance(num, (int, float))
    return num


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_count(name: str, value: object, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be an int of at least {least}, got {value!r}")


def _check_share_or_count(name: str, value: object) -> None:
    is_share = isinstance(value, float) and 0 < value <= 1
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not is_share and not is_count:
        raise ConfigError(
            f"{name} must be a float share in (0, 1] or an int count of tokens >= 1, "
            f"got {value!r}; for all tokens give 1.0"
        )


def _check_segment(name: str, value: object, page_size: int) -> None:
    _check_count(name, value, least=page_size)
    assert isinstance(value, int)
    pages, rest = divmod(value, page_size)
    if rest or pages & (pages - 1):
        raise ConfigError(
            f"{name} must be page_size={page_size} times a power of two, got {value}; "
            f"{page_size << max(0, pages.bit_length() - 1)} would do"
        )
