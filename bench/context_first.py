"""The first token of a saved context: loading and one step, against the prefill of its tokens."""

from __future__ import annotations

import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from context_disk import drop_cached, files_in, fill_cached, opened
from context_prompt import make_model, make_prompt, next_token
from decode_model import release_memory
from torch import Tensor
from tqdm import tqdm

from wavekv import OffloadConfig, OffloadedCache, OffloadedKV


class First(NamedTuple):
    """How long the first token took."""

    load_seconds: float
    step_seconds: float
    token: int
    nbytes: int
    """Of pages that were read from files, where the cache counts them."""


def first_rows(args: Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for the prefill, and rows for loading, in this process cold and warm, and cold in a new
    one."""
    prompt = make_prompt(args.shape, args.layers, args.device, args.tokens, args.seed)
    path = folder / "saved"
    shutil.rmtree(path, ignore_errors=True)
    with prompt.wrapped() as wrapped:
        cache, token, _ = prompt.prefill(wrapped)
        # those of other parts too: the same model, tokens and settings
        times = prompt.prefill_seconds
        prefill = median(times)
        began = time.perf_counter()
        saved = cache.save(path, progress=True)
        row = {"name": "prefill", "tokens": args.tokens, "seconds": prefill, "repeats": len(times)}
        row |= {"save_seconds": time.perf_counter() - began, "saved_nbytes": saved.nbytes}
        yield row
        expected = int(next_token(wrapped, cache.fork(), token))
        del cache
        release_memory()
        again = partial(first_token, path, wrapped, token)
        for state in "cold", "warm":
            yield _row(f"load, {state}", state, path, again, prefill, expected, args.repeats)
    where = args.shape, args.layers, args.device, args.seed
    once = partial(_in_new_process, first_of_process, path, *where, int(token))
    few = min(3, args.repeats)
    yield _row("load in a new process, cold", "cold", path, once, prefill, expected, few)


def _row(
    name: str,
    state: str,
    path: Path,
    measure: Callable[[], First],
    prefill: float,
    expected: int,
    repeats: int,
) -> dict[str, Any]:
    """Measure in one state of the cache of the operating system, a number of times."""
    found, cached = [], []
    for _ in tqdm(range(repeats), desc=name):
        with opened(files_in(path)) as descriptors:
            put = drop_cached if state == "cold" else fill_cached
            cached.append(put(descriptors))
        found.append(measure())
    seconds = median(one.load_seconds + one.step_seconds for one in found)
    return {
        "name": name,
        "seconds": seconds,
        "load_seconds": median(one.load_seconds for one in found),
        "step_seconds": median(one.step_seconds for one in found),
        "of_prefill": seconds / prefill,
        "page_bytes_read": max(one.nbytes for one in found),
        "same_token": sum(one.token == expected for one in found),
        "cached_share": max(cached),
        "repeats": repeats,
    }


def first_token(path: Path, wrapped: OffloadedKV, token: Tensor) -> First:
    """Load a cache and have it take in `token` [1, 1]."""
    began = time.perf_counter()
    cache = OffloadedCache.load(path, wrapped)
    loaded = time.perf_counter()
    found = int(next_token(wrapped, cache, token))
    done = time.perf_counter()
    nbytes = sum(
        layer.context.counters.host_missing * _page_bytes(layer) for layer in cache.offloaded_layers
    )
    del cache
    release_memory()
    return First(loaded - began, done - loaded, found, nbytes)


def first_of_process(
    path: Path, shape: str, layers: int | None, device: str, seed: int, token: int
) -> First:
    """`first_token` of a process that has only its modules and a model."""
    with OffloadedKV(make_model(shape, layers, device, seed), OffloadConfig()) as wrapped:
        return first_token(path, wrapped, torch.tensor([[token]], device=device))


def _in_new_process(call: Callable[..., First], *arguments: Any) -> First:
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(call, *arguments).result()


def _page_bytes(layer: Any) -> int:
    return layer.context.paged.arena.layout.page_bytes
