"""Plain numbers about a cache, summed or averaged over its offloaded layers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from wavekv.offload import LayerContext


def cache_statistics(contexts: Iterable[LayerContext | None]) -> dict[str, float | int]:
    """Summarise settled contexts.

    tokens, sequences: of one layer. pages: of all. decode_steps: of one layer.
    retrieved_fraction, tail_mass: means over steps, layers and heads of the share of the context
    that was retrieved, and of the softmax mass that was estimated. bytes_device: steady zone and
    page statistics. bytes_host, bytes_disk: pages in memory and in files, or in both; bytes_pages:
    all of them once. bytes_to_host, bytes_to_device: moved so far (on a CPU, pages written and
    pages read in place); bytes_to_disk, bytes_from_disk: by forks too. device_hit_rate: of pages
    that captured steps chose, those that were on the device; host_hit_rate: of pages that were not,
    those that were in memory (1.0 where none was wanted; a page of a mapped file counts as read
    when it is first used). late_pages: chosen, not waited for, and estimated.
    """
    made = [context for context in contexts if context is not None]
    counters = [context.counters for context in made]
    steps = sum(counter.steps for counter in counters)
    held = [context.paged.arena.held(context.paged.page_ids.view) for context in made]
    moved = [arena.moved for arena in {context.paged.arena for context in made}]
    return {
        "tokens": made[0].num_tokens if made else 0,
        "sequences": made[0].shape[0] if made else 0,
        "pages": sum(context.paged.page_ids.view.numel() for context in made),
        "decode_steps": steps // len(made) if made else 0,
        "retrieved_fraction": _mean((c.counters.retrieved_share for c in made), steps),
        "tail_mass": _mean((c.counters.tail_mass for c in made), steps),
        "bytes_device": sum(c.steady.nbytes + c.paged.statistics_nbytes for c in made),
        "bytes_host": sum(tiers.host for tiers in held),
        "bytes_disk": sum(tiers.disk for tiers in held),
        "bytes_pages": sum(
            c.paged.page_ids.view.numel() * c.paged.arena.layout.page_bytes for c in made
        ),
        "bytes_to_host": sum(counter.bytes_to_host for counter in counters),
        "bytes_to_device": sum(counter.bytes_to_device for counter in counters),
        "bytes_to_disk": sum(tiers.disk for tiers in moved),
        "bytes_from_disk": sum(tiers.host for tiers in moved),
        "device_hit_rate": _hit_rate((c.pool_wanted, c.pool_missing) for c in counters),
        "host_hit_rate": _hit_rate((c.host_wanted, c.host_missing) for c in counters),
        "late_pages": sum(counter.num_late for counter in counters),
    }


def _hit_rate(counts: Iterable[tuple[int, int]]) -> float:
    wanted, missing = map(sum, zip((0, 0), *counts, strict=True))
    return 1 - missing / wanted if wanted else 1.0


def _mean(sums: Iterable[Tensor | float], steps: int) -> float:
    return sum(float(total) for total in sums) / steps if steps else 0.0
