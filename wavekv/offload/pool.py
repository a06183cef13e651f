"""How many pages a decode engine keeps on the device: what `device_budget` leaves beside the index
and all else that steps take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from wavekv.config import OffloadConfig
from wavekv.growing import SHRINK_AT
from wavekv.kernels.step import StepShape
from wavekv.kvstore import TieredArena
from wavekv.offload.budget import page_limits
from wavekv.offload.context import LayerContext
from wavekv.offload.device_memory import (
    LIBRARY_BYTES,
    device_budget,
    free_memory,
    held_memory,
    too_much,
)
from wavekv.offload.engine_shape import table_ids, wanted_shape
from wavekv.offload.prefill_sizes import build_copies
from wavekv.offload.room import room_tokens
from wavekv.offload.sizes import (
    CacheShape,
    cache_bytes,
    engine_bytes,
    engine_step_shape,
    room_for_local,
)

DO = (
    "raise device_budget, free device memory, take fewer tokens, or lower budget; capture=False "
    "needs no pool, and steps are slower"
)
"""What to do where the pages of one step do not fit."""
EAGER_DO = "raise device_budget, free device memory, take fewer tokens, or lower budget or refine"
"""What to do where steps do not fit at all."""


def fitted_shape(contexts: Sequence[LayerContext]) -> StepShape:
    """The sizes of an engine for these contexts, such that `engine_refusal` is None.

    Raises:
        CapacityError: device_budget does not hold the pages of one step.
    """
    first, query = contexts[0], contexts[0].counters.last_query
    assert query is not None
    step, config, device = wanted_shape(contexts), first.runtime.config, query.device
    shape = CacheShape(
        layers=len(contexts),
        batch=step.batch,
        kv_heads=step.kv_heads,
        group=step.group,
        head_dim=step.head_dim,
        dtype=first.steady.keys.view.dtype,
        num_tokens=first.steady.end,
    )
    steady = sum(
        part.buffer.nbytes
        for context in contexts
        for part in (context.steady.keys, context.steady.values, context.steady.valid)
    )
    budget = device_budget(config, free_memory(device) + held_memory(contexts))
    library = LIBRARY_BYTES if device.type == "cuda" else 0
    parts = pool_parts(config, shape, step, steady, library)
    arena = first.paged.arena
    if isinstance(arena, TieredArena):
        parts["disk"] = 8 * table_ids(arena.ids.capacity, len(contexts), step)
    return with_slots(step, parts, budget)


def pool_parts(
    config: OffloadConfig, shape: CacheShape, step: StepShape, steady: int, library: int
) -> dict[str, int]:
    """Bytes of the device while an engine with the slots of `step` runs, by what they are for.
    steady: of the zones that the contexts keep; library: of workspaces."""
    parts = engine_bytes(config, shape, step)
    rows = shape.layers * step.rows
    # tokens are copied out of the ring first
    copies = build_copies(shape.dtype.itemsize) + shape.dtype.itemsize
    building = copies * 4 * rows * config.append_segment * step.head_dim
    # one part of a layer's index is there twice while it gets its room
    moved = parts["index"] // shape.layers
    return {
        "index": parts["index"],
        "steady zones": steady + parts["ring"],
        "steps": parts["scratch"] + parts["tables"] + moved,
        "growth": parts["growth"] + building,
        "libraries": library,
        "pages": parts["pool"],
    }


def with_slots(step: StepShape, parts: Mapping[str, int], budget: int) -> StepShape:
    """`step` with as many of its slots as fit the budget. parts: as of `pool_parts` (pure).

    Raises:
        CapacityError: they are fewer than the pages of one step.
    """
    slot_bytes = parts["pages"] // step.slots
    others = sum(parts.values()) - parts["pages"]
    slots = min(step.slots, max(0, budget - others) // slot_bytes)
    if slots < step.most:
        least = {**parts, "pages": step.most * slot_bytes}
        raise too_much("a captured decode step", least, budget, DO)
    return replace(step, slots=slots)


def eager_parts(config: OffloadConfig, shape: CacheShape) -> dict[str, int]:
    """Bytes of the device while steps run without an engine, as the first ones do: the index with
    its room, and what the readable kernels make of one layer (estimated)."""
    most_tokens = shape.num_tokens + room_tokens(config)
    held = cache_bytes(config, replace(shape, num_tokens=most_tokens))
    pages, D, P = held.num_pages, shape.head_dim, config.page_size
    most = min(pages, page_limits(config, most_tokens)[1])
    candidates = min(pages, most * config.refine) if config.refine > 1 and most < pages else 0
    e = shape.dtype.itemsize
    # means as floats of two sizes and numbers of a page and query head; then codes of candidates as
    # floats in three copies, or pages as they are stored and in several as floats
    of_head = pages * (2 * D * (e + 4) + 40 * shape.group)
    of_head += P * D * max(13 * candidates, (4 * e + 24) * most)
    return {
        "index": sum(held.index.values()),
        "steady zones": steady_bytes(config, shape),
        "steps": shape.batch * shape.kv_heads * of_head,
    }


def check_steps(
    config: OffloadConfig, shapes: Sequence[CacheShape], *, budget: int, is_captured: bool
) -> None:
    """Whether decode steps will fit the budget after a prefill, with numbers if not.

    shapes: the layers of each kind, as they are then; is_captured: whether steps are to be.

    Raises:
        CapacityError: they will not.
    """
    if config.mode != "retrieval":
        # pages stream by, as in the prefill
        return
    parts: Counter[str] = Counter()
    for shape in shapes:
        parts.update(eager_parts(config, shape))
    parts["libraries"] = LIBRARY_BYTES
    if sum(parts.values()) > budget:
        raise too_much("a decode step", parts, budget, EAGER_DO)
    if is_captured and len(shapes) == 1:
        foreseen_shape(config, shapes[0], budget)


def foreseen_shape(config: OffloadConfig, shape: CacheShape, budget: int) -> StepShape:
    """The sizes of an engine for this cache on CUDA, after a prefill in chunks of `prefill_chunk`,
    which is a number here.

    Raises:
        CapacityError: as `fitted_shape`.
    """
    step = engine_step_shape(config, shape)
    steady = steady_bytes(config, shape)
    parts = pool_parts(config, shape, step, steady, LIBRARY_BYTES)
    if config.disk is not None:
        parts["disk"] = 8 * table_ids(shape.layers * step.rows * step.capacity, shape.layers, step)
    return with_slots(step, parts, budget)


def steady_bytes(config: OffloadConfig, shape: CacheShape) -> int:
    """Of the steady zones that a prefill in chunks of `prefill_chunk` leaves, with the room that
    they keep."""
    # longer buffers are cut when tokens leave them
    short = SHRINK_AT * (config.num_sink_tokens + config.window + config.append_segment)
    room = min(short, room_for_local(config, shape.num_tokens))
    of_token = 2 * shape.kv_heads * shape.head_dim * shape.dtype.itemsize + 1
    return shape.layers * shape.batch * room * of_token
