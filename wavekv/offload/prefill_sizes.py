"""How long the chunks of a prefill are, what one needs of the device, and how many tokens stay
there meanwhile (pure)."""

from __future__ import annotations

from collections.abc import Callable

from wavekv.config import OffloadConfig
from wavekv.offload import streaming
from wavekv.offload.builder import BATCH_BYTES
from wavekv.offload.device_memory import device_budget

CPU_CHUNK, CUDA_CHUNK = 8192, 32768
"""Tokens of a forward where `prefill_chunk` leaves the choice. Long chunks read earlier pages less
often; on CUDA a chunk is halved, down to the CPU's, while its tensors would not fit easily."""
_BUILD_BATCHES = 6
"""Device memory of a page builder, in batches of its keys as float32: it has copies of them."""
_WORKING_SHARE = 0.25
"""Of the free device memory: what the tensors of a forward may take by choice."""


def chosen_chunk(config: OffloadConfig, free: int | None, working: Callable[[int], int]) -> int:
    """Tokens that one forward takes. free: bytes of the device, None on a CPU; working: bytes of
    the tensors of a forward over so many tokens."""
    if config.prefill_chunk is not None:
        return config.prefill_chunk
    if free is None:
        return CPU_CHUNK
    size = CUDA_CHUNK
    while size > CPU_CHUNK and working(size) > _WORKING_SHARE * free:
        size //= 2
    return size


def forward_bytes(
    num_tokens: int, *, hidden: int, inner: int, num_queries: int, head_dim: int, itemsize: int
) -> int:
    """Bytes of the tensors of a forward that are there at once: rather too little."""
    # two of the residual stream and two inside the MLP; in attention queries, keys and values of
    # every head, a block's output and the float32 output that it is merged into
    attention = num_queries * head_dim * (4 * itemsize + 4)
    return num_tokens * (itemsize * 2 * (hidden + inner) + attention)


def building_bytes(layer_bytes: int) -> int:
    """Of what builds the pages of a chunk. layer_bytes: of the tokens of one layer in a chunk."""
    return _BUILD_BATCHES * min(BATCH_BYTES, layer_bytes)


def stream_bytes(layer_bytes: int, *, is_coded: bool) -> int:
    """Of the blocks that pages pass through. layer_bytes: of the tokens of one layer; is_coded:
    whether pages are stored as small integers."""
    # of a layer that has fewer pages no block is that long
    return streaming.MEMORY_BLOCKS[is_coded] * min(streaming.BLOCK_BYTES, layer_bytes)


def resident_tokens(
    config: OffloadConfig,
    *,
    total: int,
    chunk: int,
    free: int,
    needed: int,
    stream: int,
    token_bytes: int,
) -> int:
    """Tokens of which every layer keeps a copy on the device. free, needed: bytes of the device,
    and what the prefill takes of it in any case, `stream` included; token_bytes: of a token in all
    layers."""
    room = min(device_budget(config, free) - stream, free - needed)
    # the last chunk's own pages are read by none
    wanted = (total - 1) // chunk * chunk
    return min(wanted, max(0, room) // token_bytes)
