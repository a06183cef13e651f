"""The bytes that a model and its cache need of a machine."""

from __future__ import annotations

from dataclasses import dataclass

from wavekv.config import OffloadConfig
from wavekv.errors import CapacityError
from wavekv.estimate.model import ModelShape
from wavekv.estimate.prefill import working_bytes
from wavekv.kernels.step import StepShape
from wavekv.machine.record import MachineRecord
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
    """The whole device while the prompt is read."""
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
    has_device = machine.rates.has_device
    cache = cache_bytes(config, shape, is_packed=has_device)
    weights, index = model.parameters * shape.dtype.itemsize, sum(cache.index.values())
    windows = window_bytes(model, shape)
    step = refusal = None
    if is_captured(model, machine):
        free = (machine.device_memory or 0) - weights - windows - index - cache.steady
        try:
            step = engine_step_shape(config, shape, free_memory=max(0, free))
        except CapacityError as error:
            refusal = str(error)
    device = {"index": index, "pool": 0, "steady zone": cache.steady, "working": 0}
    if step is not None:
        held = engine_bytes(config, shape, step)
        device = {"index": held["index"], "pool": held["pool"], "steady zone": held["steady"]}
        device["working"] = held["scratch"] + held["growth"]
    row = 2 * shape.layers * shape.batch * shape.kv_heads * shape.head_dim * shape.dtype.itemsize
    growing = round(index * cache.grown) + cache.local_tokens * row
    return Needs(
        device={"weights": weights, "windows": windows, **device},
        prefill=weights + windows + growing + working_bytes(model, config, shape),
        cache=cache,
        step=step,
        refusal=refusal,
    )


def is_captured(model: ModelShape, machine: MachineRecord) -> bool:
    """Whether decode steps run as one graph: all layers are offloaded, and a kernel can fetch."""
    return model.offloaded == model.layers and machine.rates.fetch is not None


def window_bytes(model: ModelShape, shape: CacheShape) -> int:
    """Keys and values of the layers that are not offloaded: each keeps its window."""
    tokens = min(shape.num_tokens, model.sliding_window) * (model.layers - model.offloaded)
    return 2 * shape.batch * model.kv_heads * model.head_dim * shape.dtype.itemsize * tokens
