"""What a prefill takes of the device, by the length of its chunks, and how many tokens stay there
meanwhile (pure)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from wavekv.config import OffloadConfig
from wavekv.offload import streaming
from wavekv.offload.builder import BATCH_BYTES
from wavekv.offload.room import room_tokens
from wavekv.offload.sizes import CacheShape, cache_bytes, room_for_local

CPU_CHUNK, CUDA_CHUNK = 8192, 32768
"""Tokens of a forward where `prefill_chunk` leaves the choice. Long chunks read earlier pages less
often; on CUDA a chunk is halved, down to the CPU's, while `device_budget` does not hold it."""
PREFILL_DO = (
    "raise device_budget, free device memory, lower prefill_chunk, or take fewer tokens or "
    "sequences; cpu_budget and host_dtype change nothing here"
)
"""What to do where a prefill does not fit."""


def chosen_chunk(config: OffloadConfig, budget: int | None, needed: Callable[[int], int]) -> int:
    """Tokens that one forward takes. budget: bytes of the device, None on a CPU; needed: those that
    a prefill takes of it in chunks of so many tokens."""
    if config.prefill_chunk is not None:
        return config.prefill_chunk
    if budget is None:
        return CPU_CHUNK
    size = CUDA_CHUNK
    while size > CPU_CHUNK and needed(size) > budget:
        size //= 2
    return size


def forward_bytes(
    num_tokens: int,
    *,
    hidden: int,
    inner: int,
    num_queries: int,
    kv_heads: int,
    head_dim: int,
    itemsize: int,
) -> int:
    """Bytes of the tensors of a forward that are there at once (estimated)."""
    e, queries = itemsize, num_queries * head_dim
    # the residual stream, what a norm made of it, cosines and sines
    held = e * (2 * hidden + 2 * head_dim)
    # float32 copies of a norm
    norm = 2 * 4 * hidden
    # queries, keys and values of every query head, a block's output and the float32 output that it
    # is merged into
    attention = queries * (4 * e + 4) + 2 * e * kv_heads * head_dim
    # gate, its activation or what goes up, their product
    block = 3 * e * inner
    return num_tokens * (held + max(norm, attention, block))


def prefill_parts(
    config: OffloadConfig,
    shapes: Sequence[CacheShape],
    *,
    new_tokens: int,
    chunk: int,
    forward: Callable[[int], int],
) -> dict[str, int]:
    """Bytes of the device while `new_tokens` are prefilled in chunks, by what they are for; pages
    that stay there come on top.

    shapes: the layers of each kind, with all tokens that there will be; forward: bytes that the
    tensors of a forward over so many tokens of each sequence take.
    """
    config = config.override(prefill_chunk=chunk)
    parts = dict.fromkeys(("index", "chunk", "forward", "stream", "building"), 0)
    parts["forward"] = forward(min(chunk, new_tokens))
    for shape in shapes:
        token_bytes = 2 * shape.batch * shape.kv_heads * shape.head_dim * shape.dtype.itemsize
        # whole pages of the last tokens and of the room
        full = max(shape.num_tokens, config.window) + room_tokens(config)
        held = cache_bytes(config, replace(shape, num_tokens=full))
        parts["index"] += sum(held.index.values())
        before = shape.num_tokens - new_tokens
        local = min(before, config.window + 2 * config.append_segment)
        room = room_for_local(config, new_tokens, local)
        # all layers wait for their pages, one of them has keys or values in two places
        zones = room * (shape.layers * (token_bytes + shape.batch) + token_bytes // 2)
        taken = min(local + new_tokens, chunk + config.segment)
        made = cache_bytes(config, replace(shape, num_tokens=taken))
        parts["chunk"] += zones + sum(made.index.values())
        is_coded = config.host_dtype != "model"
        stream = stream_bytes(shape.num_tokens * token_bytes, is_coded=is_coded)
        parts["stream"] = max(parts["stream"], stream)
        parts["building"] = max(parts["building"], building_bytes(config, shape, taken))
    return parts


def building_bytes(config: OffloadConfig, shape: CacheShape, num_tokens: int) -> int:
    """Of what builds the pages of `num_tokens` of one layer: a batch of segments at a time."""
    of_token = 4 * shape.batch * shape.kv_heads * shape.head_dim
    batch = min(num_tokens * of_token, max(BATCH_BYTES, config.segment * of_token))
    return build_copies(shape.dtype.itemsize) * batch


def build_copies(itemsize: int) -> int:
    """Device memory of a page builder, in copies of its keys as float32: tokens and pages as the
    model has them, and what sorts and encodes them (measured)."""
    return 6 + itemsize


def stream_bytes(layer_bytes: int, *, is_coded: bool) -> int:
    """Of the blocks that pages pass through. layer_bytes: of the tokens of one layer; is_coded:
    whether pages are stored as small integers."""
    # of a layer that has fewer pages no block is that long
    return streaming.MEMORY_BLOCKS[is_coded] * min(streaming.BLOCK_BYTES, layer_bytes)


def resident_tokens(*, total: int, chunk: int, room: int, token_bytes: int) -> int:
    """Tokens of which every layer keeps a copy on the device. room: bytes that are left for them;
    token_bytes: of a token in all layers."""
    # the last chunk's own pages are read by none
    wanted = (total - 1) // chunk * chunk
    return min(wanted, max(0, room) // token_bytes)
