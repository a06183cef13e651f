"""How long a prefill takes."""

from __future__ import annotations

from wavekv.estimate.model import ModelShape
from wavekv.estimate.needs import Needs
from wavekv.estimate.seconds import Prediction
from wavekv.machine.rates import Rates
from wavekv.offload.sizes import CacheShape

_BUILT_DIM = 128
"""Of the heads that `Rates.page_build` was measured with."""


def prefill_time(model: ModelShape, shape: CacheShape, needs: Needs, rates: Rates) -> Prediction:
    """Linear layers, attention and page building one after another; or bringing the pages of
    earlier chunks back from the host for every chunk, if that takes longer."""
    B, T = shape.batch, shape.num_tokens
    linear_flops = 2 * B * (T * (model.step_parameters - model.head) + model.head)
    linear = linear_flops / rates.matmul_flops
    attention = attention_flops(model, B, T) / rates.attention_of(model.head_dim)
    layout, num_pages = needs.cache.layout, needs.cache.num_pages
    tokens = shape.layers * B * shape.kv_heads * num_pages * layout.page_size
    building = tokens * shape.head_dim / _BUILT_DIM / rates.page_build
    parts = {"linear layers": linear, "attention": attention, "page building": building}
    floor, computing = linear + attention, sum(parts.values())
    if rates.h2d is None:
        how = "operations at the rates of this CPU, and pages at the rate they are built"
        return Prediction(computing, floor, parts, how)
    streaming = streamed_bytes(shape, needs) / rates.h2d
    parts["streaming, beside the rest"] = streaming
    limit = "arithmetic" if computing >= streaming else "the bus"
    how = (
        f"limited by {limit}: products at {rates.matmul_flops / 1e12:.0f} TFLOP/s, attention at "
        f"{rates.attention_of(model.head_dim) / 1e12:.0f}, pages streamed at "
        f"{rates.h2d / 1e9:.0f} GB/s; no factor measured"
    )
    return Prediction(max(computing, streaming), floor, parts, how)


def attention_flops(model: ModelShape, batch: int, num_tokens: int) -> int:
    """Of the causal half of all layers; windows see no more than they keep."""
    of_pair = 4 * batch * model.q_heads * model.head_dim
    full = num_tokens * num_tokens // 2
    window = min(num_tokens, model.sliding_window)
    windowed = window * num_tokens - window * window // 2
    return of_pair * (model.offloaded * full + (model.layers - model.offloaded) * windowed)


def streamed_bytes(shape: CacheShape, needs: Needs) -> int:
    """What all chunks of a prefill bring back: each the tokens before it that are not resident."""
    starts = range(needs.prefill_chunk, shape.num_tokens, needs.prefill_chunk)
    tokens = sum(max(0, start - needs.resident_tokens) for start in starts)
    layout = needs.cache.layout
    heads = shape.layers * shape.batch * shape.kv_heads
    return heads * tokens * layout.page_bytes // layout.page_size
