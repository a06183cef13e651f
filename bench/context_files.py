"""Saving a cache and loading it with all pages read and verified, and the raw disk between."""

from __future__ import annotations

import shutil
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from context_disk import drop_cached, files_in, opened, read_raw, write_raw
from context_prompt import make_prompt
from decode_model import release_memory
from tqdm import tqdm

from wavekv import OffloadedCache


def files_rows(args: Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for writing and one for reading: of each the seconds of ours and of the raw disk, in
    turns. Everything is cold before it is read."""
    prompt = make_prompt(args.shape, args.layers, args.device, args.tokens, args.seed)
    with prompt.wrapped() as wrapped:
        cache, _, _ = prompt.prefill(wrapped)
        saved, raw = folder / "saved", folder / "raw"
        seconds: dict[str, list[float]] = {"save": [], "write": [], "load": [], "read": []}
        cached = []
        # the first of all is for what happens once
        for _ in tqdm(range(args.repeats + 1), desc="files"):
            shutil.rmtree(saved, ignore_errors=True)
            shutil.rmtree(raw, ignore_errors=True)
            began = time.perf_counter()
            cache.save(saved)
            seconds["save"].append(time.perf_counter() - began)
            sizes = [path.stat().st_size for path in files_in(saved)]
            seconds["write"].append(write_raw(raw, sizes))
            with opened(files_in(saved)) as descriptors:
                cached.append(drop_cached(descriptors))
            began = time.perf_counter()
            loaded = OffloadedCache.load(saved, wrapped, verify=True)
            seconds["load"].append(time.perf_counter() - began)
            del loaded
            release_memory()
            seconds["read"].append(read_raw(raw))
    for ours, disk in ("save", "write"), ("load", "read"):
        times = {"ours": seconds[ours][1:], "raw": seconds[disk][1:]}
        ratios = [a / b for a, b in zip(times["raw"], times["ours"], strict=True)]
        yield {
            "name": ours,
            "tokens": args.tokens,
            "files": len(sizes),
            "nbytes": sum(sizes),
            **{f"{name}_seconds": median(each) for name, each in times.items()},
            **{f"{name}_gb_per_s": sum(sizes) / median(t) / 1e9 for name, t in times.items()},
            "ratio": median(ratios),
            "cached_share": max(cached),
            "repeats": args.repeats,
        }
