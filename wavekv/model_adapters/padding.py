"""Which cached tokens are padding: remembered, so that a mask that says otherwise is noticed."""

from __future__ import annotations

from torch import Tensor

from wavekv.errors import CacheError


class PaddingRecord:
    """The padding of one cache. Columns behind the last padded one are not stored: all valid."""

    def __init__(self) -> None:
        self.valid: Tensor | None = None
        """[B, n] bool, up to the last padded column; None if no cached token is padding."""

    @property
    def is_empty(self) -> bool:
        """Whether no cached token is padding."""
        return self.valid is None

    def take_in(self, mask: Tensor | None, seen: int) -> None:
        """Add the tokens from `seen` on; those before must be as they were.

        mask: [B, seen + T] bool, or None if all tokens are valid. Away from the CPU a single token
        is taken in unchecked: a check would make the host wait for the device.

        Raises:
            CacheError: tokens that are cached changed between padding and valid.
        """
        if mask is None:
            if self.valid is not None:
                raise CacheError(
                    "some cached tokens are padding, got a forward without attention_mask; pass "
                    "the mask of all tokens so far, [B, cached + new], as when they were cached"
                )
            return
        if mask.shape[1] > seen + 1 or mask.device.type == "cpu":
            self._check(mask[:, :seen])
            self.valid = _trimmed(mask)

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        if self.valid is not None:
            self.valid = _trimmed(self.valid[:, :length])

    def select(self, index: Tensor) -> None:
        """Keep the sequences `index`, in that order."""
        if self.valid is not None:
            self.valid = _trimmed(self.valid[index.to(self.valid.device)])

    def copy(self) -> PaddingRecord:
        """An independent record of the same."""
        copy = PaddingRecord()
        copy.valid = self.valid
        return copy

    def _check(self, cached: Tensor) -> None:
        known = 0 if self.valid is None else self.valid.shape[1]
        same = bool(cached[:, known:].all())
        if self.valid is not None:
            same = same and bool((cached[:, :known] == self.valid).all())
        if not same:
            raise CacheError(
                "attention_mask differs from the one these tokens were cached with: expected the "
                "same padding for cached tokens, got other; a cached token cannot be masked or "
                "unmasked later, so crop() it away or start a new cache"
            )


def _trimmed(valid: Tensor) -> Tensor | None:
    padded = (~valid).any(0).nonzero()
    return valid[:, : int(padded[-1]) + 1] if len(padded) else None
