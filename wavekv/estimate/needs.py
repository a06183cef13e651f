"""The bytes that a model and its cache need of a machine."""

from __future__ import annotations

from dataclasses import dataclass

from wavekv.config import OffloadConfig
from wavekv.errors import CapacityError
from wavekv.estimate.model import ModelShape
from wavekv.kernels.step import StepShape
from wavekv.machine.record import MachineRecord
from wavekv.offload.prefill_sizes import (
    building_bytes,
    chosen_chunk,
    forward_bytes,
    resident_tokens,
    stream_bytes,
)
from wavekv.offload.sizes import (
    CacheBytes,
    CacheShape,
    cache_bytes,
    engine_bytes,
    engine_step_shape,
)


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes, by what they are for."""

    device: dict[str, int]
    """While decoding: weights, layers with windows, index, pool, steady zone, working memory. On a
    CPU what a device would hold."""
    prefill: int
    """The whole device while the prompt is read, with the pages that stay there meanwhile."""
    prefill_chunk: int
    resident_tokens: int
    """Of each sequence, whose pages stay on the device during the prefill."""
    cache: CacheBytes
    """After the prefill. Of the index `device` has more: room for tokens to come."""
    step: StepShape | None
    """Of the engine; None where steps are not captured, or no pool fits."""
    refusal: str | None
    """Why no pool fits."""

    @property
    def decode(self) -> int:
        """The whole device while decoding."""
        return sum(self.device.values())

    @property
    def total(self) -> int:
        """The most that the device holds at a time."""
        return max(self.prefill, self.decode)

    @property
    def host(self) -> int:
        """Pages, and where they are."""
        return self.cache.host_pages + self.cache.host_tables


def needs_of(
    model: ModelShape, config: OffloadConfig, machine: MachineRecord, shape: CacheShape
) -> Needs:
    """Of a prefill and the steps after it."""
    has_device, T = machine.rates.has_device, shape.num_tokens
    weights, windows = model.parameters * shape.dtype.itemsize, window_bytes(model, shape)
    free = max(0, (machine.device_memory or 0) - weights - windows) if has_device else None
    chunk = chosen_chunk(config, free, lambda size: _forward_bytes(model, shape, size))
    config = config.override(prefill_chunk=chunk)
    cache = cache_bytes(config, shape)
    index = sum(cache.index.values())
    token_bytes = 2 * shape.layers * shape.batch * shape.kv_heads * shape.head_dim
    token_bytes *= shape.dtype.itemsize
    growing = index + cache.local_tokens * token_bytes + _forward_bytes(model, shape, min(chunk, T))
    resident = 0
    if free is not None:
        is_coded = config.host_dtype != "model"
        stream = stream_bytes(T * token_bytes // shape.layers, is_coded=is_coded)
        growing += stream + building_bytes(min(chunk, T) * token_bytes // shape.layers)
        resident = resident_tokens(
            config,
            total=T,
            chunk=chunk,
            free=free,
            needed=growing,
            stream=stream,
            token_bytes=token_bytes,
        )
    step = refusal = None
    if free is not None and is_captured(model, machine):
        try:
            step = engine_step_shape(config, shape, free=max(0, free - index - cache.steady))
        except CapacityError as error:
            refusal = str(error)
    device = {"index": index, "pool": 0, "steady zone": cache.steady, "working": 0}
    if step is not None:
        held = engine_bytes(config, shape, step)
        device = {"index": held["index"], "pool": held["pool"], "steady zone": held["steady"]}
        device["working"] = held["scratch"] + held["growth"]
    return Needs(
        device={"weights": weights, "windows": windows, **device},
        prefill=weights + windows + growing + resident * token_bytes,
        prefill_chunk=chunk,
        resident_tokens=resident,
        cache=cache,
        step=step,
        refusal=refusal,
    )


def _forward_bytes(model: ModelShape, shape: CacheShape, num_tokens: int) -> int:
    return forward_bytes(
        num_tokens * shape.batch,
        hidden=model.hidden,
        inner=model.intermediate,
        num_queries=model.q_heads,
        head_dim=model.head_dim,
        itemsize=shape.dtype.itemsize,
    )


def is_captured(model: ModelShape, machine: MachineRecord) -> bool:
    """Whether decode steps run as one graph: all layers are offloaded, and a kernel can fetch."""
    return model.offloaded == model.layers and machine.rates.fetch is not None


def window_bytes(model: ModelShape, shape: CacheShape) -> int:
    """Keys and values of the layers that are not offloaded: each keeps its window."""
    tokens = min(shape.num_tokens, model.sliding_window) * (model.layers - model.offloaded)
    return 2 * shape.batch * model.kv_heads * model.head_dim * shape.dtype.itemsize * tokens
