"""Decode steps of a loaded context whose pages come from files, against those of the cache that was
saved: time by time, until what steps choose again and again is in memory."""

from __future__ import annotations

import shutil
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from context_disk import drop_cached, files_in, opened
from context_prompt import make_prompt, next_token
from decode_model import release_memory
from torch import Tensor
from tqdm import tqdm

from wavekv import OffloadedCache, OffloadedKV

EAGER = 8
"""Steps until steps on CUDA are captured, and some."""
HOST_SHARE = 0.25
DEADLINE = 0.001


def steps_rows(args: Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for the saved cache, and for the loaded one with all or a quarter of its pages in host
    memory, without and with a deadline for pages."""
    prompt = make_prompt(args.shape, args.layers, args.device, args.tokens, args.seed)
    path = folder / "saved"
    shutil.rmtree(path, ignore_errors=True)
    with prompt.wrapped() as wrapped:
        cache, token, _ = prompt.prefill(wrapped)
        nbytes = int(cache.stats()["bytes_pages"])
        cache.save(path, progress=True)
        expected = Steps(wrapped, cache, token, args.steps)
        yield expected.row("in memory", expected)
        del cache
        release_memory()
        quarter = {"cpu_budget": int(HOST_SHARE * nbytes)}
        for name, settings in {
            "loaded, all fits": {},
            "loaded, a quarter fits": quarter,
            "loaded, a quarter fits, deadline 1 ms": quarter | {"disk_deadline": DEADLINE},
        }.items():
            wrapped.offload_config = wrapped.offload_config.override(
                **{"cpu_budget": 0.8, "disk_deadline": None} | settings
            )
            with opened(files_in(path)) as descriptors:
                drop_cached(descriptors)
            loaded = OffloadedCache.load(path, wrapped)
            yield Steps(wrapped, loaded, token, args.steps).row(name, expected)
            del loaded
            release_memory()


class Steps:
    """Greedy steps of one cache."""

    def __init__(self, wrapped: OffloadedKV, cache: OffloadedCache, token: Tensor, count: int):
        self.tokens: list[int] = []
        self.seconds: list[float] = []
        for _ in tqdm(range(count), desc="steps", leave=False):
            began = time.perf_counter()
            token = next_token(wrapped, cache, token)
            self.tokens.append(int(token))
            self.seconds.append(time.perf_counter() - began)
        self.is_captured = cache.steps is not None and cache.steps._graph is not None
        self.statistics = cache.stats()

    def row(self, name: str, expected: Steps) -> dict[str, Any]:
        """The figures, against those of another."""
        captured = self.seconds[EAGER:]
        part = max(1, len(captured) // 4)
        names = "device_hit_rate", "host_hit_rate", "late_pages", "bytes_from_disk"
        return {
            "name": name,
            "steps": len(self.tokens),
            "is_captured": self.is_captured,
            "same_tokens": sum(a == b for a, b in zip(self.tokens, expected.tokens, strict=True)),
            "first_ms": 1e3 * self.seconds[0],
            "early_ms": 1e3 * median(captured[:part]),
            "late_ms": 1e3 * median(captured[-part:]),
            **{name: self.statistics[name] for name in names},
        }
