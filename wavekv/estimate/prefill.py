"""How long a prefill takes, and what memory it needs while it runs."""

from __future__ import annotations

from wavekv.config import OffloadConfig
from wavekv.estimate.model import ModelShape
from wavekv.estimate.seconds import Prediction
from wavekv.machine.rates import Rates
from wavekv.offload.sizes import CacheBytes, CacheShape
from wavekv.offload.transfer import BLOCK_BYTES

_BUILT_DIM = 128
"""Of the heads that `Rates.page_build` was measured with."""


def prefill_time(
    model: ModelShape, config: OffloadConfig, shape: CacheShape, cache: CacheBytes, rates: Rates
) -> Prediction:
    """Linear layers, attention and page building one after another; or bringing the pages of
    earlier chunks back from the host for every chunk, if that takes longer."""
    B, T = shape.batch, shape.num_tokens
    linear_flops = 2 * B * (T * (model.step_parameters - model.head) + model.head)
    linear = linear_flops / rates.matmul_flops
    attention = attention_flops(model, B, T) / rates.attention_of(model.head_dim)
    tokens = shape.layers * B * shape.kv_heads * cache.num_pages * config.page_size
    building = tokens * shape.head_dim / _BUILT_DIM / rates.page_build
    parts = {"linear layers": linear, "attention": attention, "page building": building}
    floor = linear + attention
    if not rates.has_device:
        how = "operations at the rates of this CPU, and pages at the rate they are built"
        return Prediction(sum(parts.values()), floor, parts, how)
    bus = min(rates.h2d or 0.0, rates.host_gather)
    streaming = streamed_bytes(config, cache) / bus
    parts["streaming, beside the rest"] = streaming
    computing = linear + attention + building
    limit = "arithmetic" if computing >= streaming else "the bus"
    how = (
        f"limited by {limit}: products at {rates.matmul_flops / 1e12:.0f} TFLOP/s, attention at "
        f"{rates.attention_of(model.head_dim) / 1e12:.0f}, pages streamed at {bus / 1e9:.0f} GB/s; "
        "no factor measured"
    )
    return Prediction(max(computing, streaming), floor, parts, how)


def attention_flops(model: ModelShape, batch: int, num_tokens: int) -> int:
    """Of the causal half of all layers; windows see no more than they keep."""
    of_pair = 4 * batch * model.q_heads * model.head_dim
    full = num_tokens * num_tokens // 2
    window = min(num_tokens, model.sliding_window)
    windowed = window * num_tokens - window * window // 2
    return of_pair * (model.offloaded * full + (model.layers - model.offloaded) * windowed)


def streamed_bytes(config: OffloadConfig, cache: CacheBytes) -> int:
    """Pages that all chunks of a prefill bring back: each those of all chunks before it."""
    pages_per_chunk = config.prefill_chunk // config.page_size
    chunks = cache.num_pages // max(1, pages_per_chunk)
    of_page = cache.host_pages // max(1, cache.num_pages)
    return of_page * pages_per_chunk * (chunks * (chunks + 1) // 2)


def working_bytes(model: ModelShape, config: OffloadConfig, shape: CacheShape) -> int:
    """About what a forward over one chunk takes on the device beside weights and cache: the larger
    of a feed-forward block and of attention, the blocks that pages come in, and the pages of one
    layer under construction. By reading the code, not measured."""
    e, tokens = shape.dtype.itemsize, shape.batch * min(shape.num_tokens, config.prefill_chunk)
    feed_forward = 3 * model.intermediate * e
    # two attention states in float32, what is merged of them, and the operator's own output
    attention = model.q_heads * model.head_dim * (3 * 4 + 2 * e)
    activations = tokens * (4 * model.hidden * e + max(feed_forward, attention))
    segment = shape.batch * shape.kv_heads * min(shape.num_tokens, config.segment)
    # keys and values, the same in the order of pages, and float32 copies to cluster
    building = segment * shape.head_dim * (4 * e + 2 * 4)
    return activations + 4 * BLOCK_BYTES + building
