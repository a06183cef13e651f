"""The options of an index."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from wavekv.errors import ConfigError

BLOCK_PAGES = 16
"""Pages of a block, whose means lie together; a cache whose segments have fewer makes smaller ones
(`wavekv.index.levels.block_pages`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexParams:
    """How keys are clustered and coded. A wrong value is a ConfigError."""

    page_size: int = 16
    """Keys in a page, a power of two from 1 to 256, of keys with values to 128. Smaller pages reach
    a recall with fewer keys scanned, but there are more of them to rank and to keep."""
    segment: int = 2048
    """Keys that are clustered at once: `page_size` times a power of two, at least 16 pages. Keys
    that come together are often alike, so longer segments find no better pages, and take longer."""
    refine: bool = False
    """Let keys change places between pages once more: four times the time to build, and recall as
    of half again as many scanned keys."""
    code_dims: int | None = None
    """Directions of each key that get a four-bit code, a multiple of 8; the others are dropped from
    the codes. None: all, or, if the queries are known by a sample, as many as hold 98 % of what
    such queries see."""

    def __post_init__(self) -> None:
        for name in ("page_size", "segment"):
            _expect_count(name, getattr(self, name))
        if self.page_size > 256 or self.page_size & (self.page_size - 1):
            raise ConfigError(
                f"page_size must be a power of two from 1 to 256, got {self.page_size}"
            )
        pages, rest = divmod(self.segment, self.page_size)
        if rest or pages < BLOCK_PAGES or pages & (pages - 1):
            raise ConfigError(
                f"segment must be page_size={self.page_size} times a power of two that is at least "
                f"{BLOCK_PAGES}, got {self.segment}"
            )
        if not isinstance(self.refine, bool):
            raise ConfigError(f"refine must be True or False, got {self.refine!r}")
        if self.code_dims is not None:
            _expect_count("code_dims", self.code_dims)
            if self.code_dims % 8:
                raise ConfigError(f"code_dims must be a multiple of 8, got {self.code_dims}")

    @property
    def block(self) -> int:
        """Keys in the smallest segment; fewer at the end wait unclustered and are searched all."""
        return BLOCK_PAGES * self.page_size

    def expect_dim(self, dim: int) -> None:
        """Keys of `dim` dimensions can be coded so.

        Raises:
            ConfigError: `code_dims` is more than that.
        """
        if self.code_dims is not None and self.code_dims > -(-dim // 8) * 8:
            raise ConfigError(
                f"code_dims must be at most {-(-dim // 8) * 8} for keys of {dim} dimensions, "
                f"got {self.code_dims}"
            )

    def expect_values(self) -> None:
        """Keys may have values: statistics for attention keep the count of a page in a byte.

        Raises:
            ConfigError: `page_size` is 256.
        """
        if self.page_size > 128:
            raise ConfigError(
                f"page_size must be at most 128 for keys with values, got {self.page_size}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `IndexParams(**params.to_dict())` is the same."""
        return asdict(self)


def _expect_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
