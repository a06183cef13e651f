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
    page statistics. bytes_host: pages. bytes_to_host, bytes_to_device: moved so far (on a CPU,
    pages written and pages read in place).
    """
    made = [context for context in contexts if context is not None]
    steps = sum(context.counters.steps for context in made)
    return {
        "tokens": made[0].num_tokens if made else 0,
        "sequences": made[0].shape[0] if made else 0,
        "pages": sum(context.paged.page_ids.view.numel() for context in made),
        "decode_steps": steps // len(made) if made else 0,
        "retrieved_fraction": _mean((c.counters.retrieved_share for c in made), steps),
        "tail_mass": _mean((c.counters.tail_mass for c in made), steps),
        "bytes_device": sum(c.steady.nbytes + c.paged.statistics_nbytes for c in made),
        "bytes_host": sum(
            c.paged.page_ids.view.numel() * c.paged.arena.layout.page_bytes for c in made
        ),
        "bytes_to_host": sum(c.counters.bytes_to_host for c in made),
        "bytes_to_device": sum(c.counters.bytes_to_device for c in made),
    }


def _mean(sums: Iterable[Tensor | float], steps: int) -> float:
    return sum(float(total) for total in sums) / steps if steps else 0.0
