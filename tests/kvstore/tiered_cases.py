"""What the tests of pages in two tiers share: small arenas, and pages to put into them."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from wavekv.kernels.crc32 import crc32_rows
from wavekv.kvstore import KVLayout, MemoryBudget, SavedPages, TieredArena

LAYOUTS = {
    "whole blocks of the disk": KVLayout(8, 64, torch.float32),
    "bytes of no such size": KVLayout(8, 64, torch.bfloat16, "int8"),
    "tiny": KVLayout(4, 3, torch.float32),
}


def make_arena(
    folder: str | None, layout: KVLayout, host: int, disk: int, chunk: int = 4, **options: object
) -> TieredArena:
    size = layout.page_bytes
    disk_budget = MemoryBudget(disk * size, "disk_budget", "disk")
    return TieredArena(
        layout,
        MemoryBudget(host * size),
        disk_budget,
        folder,
        pin=False,
        chunk_bytes=chunk * size,
        **options,
    )


def random_pages(layout: KVLayout, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randn(count, *layout.page_shape, generator=generator).to(layout.dtype)
    return layout.encode(pages)


def add(arena: TieredArena, pages: torch.Tensor) -> torch.Tensor:
    ids = arena.allocate(len(pages))
    arena.put(ids, pages)
    arena.seal(ids)
    return ids


def saved_pages(folder: Path, pages: torch.Tensor, rows: int = 32) -> SavedPages:
    """Pages in files of `rows` each."""
    names = [folder / f"{number}" for number in range(-(-len(pages) // rows))]
    for name, part in zip(names, pages.split(rows), strict=True):
        name.write_bytes(part.numpy().tobytes())
    descriptors = [os.open(name, os.O_RDONLY) for name in names]
    crc32 = crc32_rows(pages.flatten(1).view(torch.uint8)).numpy()
    return SavedPages([str(name) for name in names], descriptors, [], crc32, rows_per_file=rows)
