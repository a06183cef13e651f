"""Random pages out of files, by the tiers of an arena and by a plain pool of threads.

Three kinds of file: that of pages over `cpu_budget`, those of a saved context read into host
memory, and the same mapped. Three states: `cold`, nothing is in memory; `cached`, the operating
system has the files in its cache; `held`, the arena has the pages in host memory, and for the plain
pool the operating system has them.
"""

from __future__ import annotations

import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from context_disk import drop_cached, fill_cached, opened, reopened, unnamed_files
from context_pool import PlainPool
from numpy.typing import NDArray
from tqdm import tqdm

from wavekv.kvstore import KVLayout, MappedArena, MemoryBudget, SavedPages, TieredArena
from wavekv.saved.page_array import PageArray
from wavekv.saved.reader import ContextReader
from wavekv.saved.writer import ContextWriter

LAYOUTS = {
    4096: KVLayout(8, 128, torch.bfloat16),
    2576: KVLayout(8, 128, torch.bfloat16, "int8"),
    8192: KVLayout(16, 128, torch.bfloat16),
}
"""By the bytes of a page."""
HOST_SHARE = 1 / 8
"""Of the pages that fit host memory."""
_FILLS = 256
"""Steps in which memory is filled."""

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """Pages in files, and two ways to read them."""

    files: str
    num_rows: int
    missing: Callable[[], Ids]
    """Ids of pages that are not in memory yet."""
    read: Callable[[Ids], object]
    descriptors: Sequence[int]
    """Through which the plain pool reads."""
    buffered: Sequence[int]
    """The same files, by way of the cache of the system."""
    rows_per_file: int
    states: tuple[str, ...]


def pages_rows(args: Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each size of a page, kind of file, batch, and state."""
    for page_bytes in args.page_bytes:
        layout = LAYOUTS[page_bytes]
        num_pages = args.size // page_bytes
        for source_of in _over_budget, _saved_read, _saved_mapped:
            with ExitStack() as stack:
                source = source_of(layout, num_pages, folder, stack)
                for batch in args.batches:
                    for state in source.states:
                        row = _measure(source, page_bytes, batch, state, args.repeats, stack)
                        yield {"page_bytes": page_bytes, "files": source.files} | row


def _measure(
    source: Source, page_bytes: int, batch: int, state: str, repeats: int, stack: ExitStack
) -> dict[str, Any]:
    """Time both, one after the other in turns."""
    generator = np.random.default_rng(0)
    through = source.descriptors if state == "cold" else source.buffered
    pool = PlainPool(through, page_bytes, source.rows_per_file, batch)
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    cached = []
    # the first of all is for what happens once
    for repeat in tqdm(range(repeats + 1), desc=f"{source.files} {batch} {state}", leave=False):
        for name in sorted(seconds, reverse=repeat % 2 == 1):
            ids = generator.choice(source.missing(), batch, replace=False)
            rows = generator.choice(source.num_rows, batch, replace=False).tolist()
            if state == "cold":
                cached.append(drop_cached(source.buffered))
            elif repeat == 0:
                fill_cached(source.buffered)
            if state == "held" and name == "ours":
                source.read(ids)
            began = time.perf_counter()
            if name == "ours":
                source.read(ids)
            else:
                pool.read(rows)
            seconds[name].append(time.perf_counter() - began)
    ours, plain = (np.array(seconds[name][1:]) for name in ("ours", "plain"))
    return {
        "batch": batch,
        "state": state,
        "ours_ms": 1e3 * median(ours),
        "plain_ms": 1e3 * median(plain),
        "ours_pages_per_s": batch / median(ours),
        "plain_pages_per_s": batch / median(plain),
        "ratio": float(np.median(plain / ours)),
        "cached_share": max(cached, default=1.0),
        "repeats": repeats,
    }


def _over_budget(layout: KVLayout, num_pages: int, folder: Path, stack: ExitStack) -> Source:
    size = layout.page_bytes
    budget, disk_budget = (MemoryBudget(int(x * num_pages * size)) for x in (HOST_SHARE, 2))
    before = set(unnamed_files(folder))
    arena = TieredArena(layout, budget, disk_budget, str(folder), pin=False)
    (descriptor,) = set(unnamed_files(folder)) - before
    generator = torch.Generator().manual_seed(0)
    filled = []
    step = -(-num_pages // _FILLS)
    for first in tqdm(range(0, num_pages, step), desc=f"pages of {size}", leave=False):
        ids = arena.allocate(min(step, num_pages - first))
        arena.put(ids, _random_pages(layout, len(ids), generator))
        arena.seal(ids)
        filled.append(ids)
    ids = torch.cat(filled)
    # the file is longer than what is written in it
    num_rows = arena.disk.bytes_written // size
    is_direct = size % 4096 == 0
    return Source(
        "over cpu_budget",
        num_rows,
        lambda: ids[arena.slots_of(ids) < 0].numpy(),
        lambda wanted: arena.bring(torch.from_numpy(wanted)),
        [descriptor],
        stack.enter_context(reopened(descriptor, os.O_RDONLY)),
        1 << 62,
        ("cold", "held") if is_direct else ("cold", "cached", "held"),
    )


def _saved_read(layout: KVLayout, num_pages: int, folder: Path, stack: ExitStack) -> Source:
    array, descriptors = _saved(layout, num_pages, folder, stack)
    budget = MemoryBudget(int(HOST_SHARE * num_pages * layout.page_bytes))
    saved = _saved_pages(array)
    arena = TieredArena(layout, budget, MemoryBudget(0), None, pin=False, base=saved)
    ids = torch.arange(num_pages)
    # as it is after a while: a page that comes takes the place of another
    for some in ids[: int(HOST_SHARE * num_pages)].split(-(-num_pages // _FILLS)):
        arena.bring(some)
    return Source(
        "saved, read",
        num_pages,
        lambda: ids[arena.slots_of(ids) < 0].numpy(),
        lambda wanted: arena.bring(torch.from_numpy(wanted)),
        descriptors,
        descriptors,
        array.rows_per_file,
        ("cold", "cached"),
    )


def _saved_mapped(layout: KVLayout, num_pages: int, folder: Path, stack: ExitStack) -> Source:
    array, descriptors = _saved(layout, num_pages, folder, stack)
    arenas: list[MappedArena] = []

    def missing() -> Ids:
        # mapped anew: pages that were touched are not dropped, and not checked again
        arenas[:] = [MappedArena(layout, MemoryBudget(1 << 30), _saved_pages(array))]
        return np.arange(num_pages)

    def read(wanted: Ids) -> None:
        ids = torch.from_numpy(wanted)
        arenas[0].bring(ids)
        arenas[0].gather(ids)

    rows = array.rows_per_file
    states = "cold", "cached"
    return Source("saved, mapped", num_pages, missing, read, descriptors, descriptors, rows, states)


def _saved(
    layout: KVLayout, num_pages: int, folder: Path, stack: ExitStack
) -> tuple[PageArray, list[int]]:
    """Random pages in files of a saved context, and descriptors of these."""
    path = Path(stack.enter_context(TemporaryDirectory(dir=folder))) / "context"
    generator = torch.Generator().manual_seed(0)
    form = layout.stored_shape, layout.stored_dtype
    with ContextWriter(path) as writer:

        def read(first: int, last: int) -> torch.Tensor:
            return _random_pages(layout, last - first, generator)

        writer.pages("pages/0", num_pages, *form, read)
        writer.commit({})
    array = stack.enter_context(ContextReader.open(path)).pages("pages/0")
    return array, stack.enter_context(opened(path / name for name in array.files))


def _saved_pages(array: PageArray) -> SavedPages:
    """What a cache that is loaded has of them."""
    rows, crc32 = array.rows_per_file, array.crc32.numpy()
    return SavedPages(list(array.files), array.open(), array.map(), crc32, rows_per_file=rows)


def _random_pages(layout: KVLayout, count: int, generator: torch.Generator) -> torch.Tensor:
    """[count, *stored_shape]"""
    size = count, layout.page_bytes
    pages = torch.randint(256, size, generator=generator, dtype=torch.uint8)
    return pages.view(layout.stored_dtype).view(count, *layout.stored_shape)
