"""Page ids with counted references: which are in use, and which are free."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int64]


class PageIds:
    """Ids from 0 on. A freed id is given out again before a new one."""

    def __init__(self) -> None:
        # numpy: tensors made inside inference mode could not be changed outside it
        self.references = np.empty(0, dtype=np.int32)
        """[capacity] int32"""
        self.free = np.empty(0, dtype=np.int64)
        self._dropped: deque[Ids] = deque()

    @property
    def capacity(self) -> int:
        """Ids there are, free or in use."""
        return len(self.references)

    @property
    def num_used(self) -> int:
        """Ids with a reference."""
        return self.capacity - len(self.free)

    def grow(self, count: int) -> None:
        """Have `count` more ids, free."""
        start = self.capacity
        self.references = np.pad(self.references, (0, count))
        self.free = np.concatenate([self.free, np.arange(start, self.capacity)])

    def allocate(self, count: int) -> Ids:
        """`count` free ids, of which there must be as many, with one reference each."""
        ids, self.free = self.free[:count].copy(), self.free[count:]
        self.references[ids] = 1
        return ids

    def retain(self, ids: Tensor) -> None:
        """Add a reference to each of `ids` (any shape; an id may recur)."""
        pages = ids.flatten().numpy()
        if (np.diff(pages) > 0).all():
            # none recurs, as in what was saved: far faster
            self.references[pages] += 1
        else:
            np.add.at(self.references, pages, 1)

    def release(self, ids: Ids) -> Ids:
        """Take a reference from each of `ids` [n]. Returns those that are free now."""
        np.subtract.at(self.references, ids, 1)
        touched = np.unique(ids)
        freed: Ids = touched[self.references[touched] == 0]
        self.free = np.concatenate([freed, self.free])
        return freed

    def drop(self, ids: Tensor) -> None:
        """`release` for finalisers, which may run on any thread and inside any other method: it
        takes effect with `collect`."""
        # a copy: the tensor may be in the middle of its own collection
        self._dropped.append(ids.flatten().numpy().copy())

    def collect(self) -> Ids:
        """Release what was dropped. Returns the ids that are free now."""
        freed = [np.empty(0, dtype=np.int64)]
        while self._dropped:
            freed.append(self.release(self._dropped.popleft()))
        return np.concatenate(freed)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless each id is either free or referenced."""
        is_free = np.zeros(self.capacity, dtype=bool)
        is_free[self.free] = True
        twice = len(self.free) - int(is_free.sum())
        wrong = int((is_free != (self.references == 0)).sum())
        if twice or wrong or (self.capacity and int(self.references.min()) < 0):
            raise RuntimeError(
                f"arena integrity: {twice} pages twice in the free list, {wrong} of "
                f"{self.capacity} pages both free and referenced or neither"
            )
