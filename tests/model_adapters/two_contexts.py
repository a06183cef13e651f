"""Two caches of one shape and a saved context of each, to be told apart whole."""

from __future__ import annotations

from pathlib import Path

import torch
from saved_caches import digests
from saver import answers, small_model, two_caches, which_of

from wavekv import OffloadedCache, SavedContext


class Two:
    """Two caches of one shape, what each answers, and a saved context of each."""

    def __init__(self, folder: Path) -> None:
        self.model = small_model()
        self.caches = two_caches(self.model)
        self.expected = [
            answers(self.model, cache.fork(), which) for which, cache in enumerate(self.caches)
        ]
        assert not torch.equal(*self.expected)
        self.paths = [folder / "a", folder / "b"]
        for cache, path in zip(self.caches, self.paths, strict=True):
            cache.save(path)
        self.digests = [digests(path) for path in self.paths]

    def which(self, path: Path) -> int:
        """Which of the two is saved at a path, whole: bytes, checksums and answers."""
        which = self.digests.index(digests(path))
        assert SavedContext.open(path).verify() == []
        assert which_of(self.model, OffloadedCache.load(path, self.model), self.expected) == which
        return which
