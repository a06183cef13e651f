"""The bytes that a model and its cache need of a machine."""

from __future__ import annotations

from dataclasses import dataclass

from wavekv.config import OffloadConfig
from wavekv.errors import CapacityError
from wavekv.estimate.model import ModelShape
from wavekv.kernels.step import StepShape
from wavekv.machine.record import MachineRecord
from wavekv.offload.device_memory import LIBRARY_BYTES, device_budget, too_much
from wavekv.offload.pool import check_steps, foreseen_shape, pool_parts, steady_bytes
from wavekv.offload.prefill_sizes import (
    PREFILL_DO,
    chosen_chunk,
    forward_bytes,
    prefill_parts,
    resident_tokens,
)
from wavekv.offload.sizes import CacheBytes, CacheShape, cache_bytes


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
    """Of the engine; None where steps are not captured, or do not fit."""
    refusals: list[str]
    """Why a prefill is refused before it begins."""

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
    budget = None
    if has_device:
        budget = device_budget(config, max(0, (machine.device_memory or 0) - weights - windows))

    def parts(chunk: int) -> dict[str, int]:
        found = prefill_parts(
            config,
            [shape],
            new_tokens=T,
            chunk=chunk,
            forward=lambda tokens: _forward_bytes(model, shape, tokens),
        )
        found["forward"] += 8 * shape.batch * T
        return found | {"libraries": LIBRARY_BYTES}

    chunk = chosen_chunk(config, budget, lambda size: sum(parts(size).values()))
    config = config.override(prefill_chunk=chunk)
    cache = cache_bytes(config, shape)
    token_bytes = 2 * shape.layers * shape.batch * shape.kv_heads * shape.head_dim
    token_bytes *= shape.dtype.itemsize
    index = sum(cache.index.values())
    device = {"index": index, "pool": 0, "steady zone": cache.steady, "working": 0}
    reading = index + cache.local_tokens * token_bytes + _forward_bytes(model, shape, min(chunk, T))
    resident, step, refusals = 0, None, list[str]()
    if budget is not None:
        needed = parts(chunk)
        reading = sum(needed.values())
        left = budget - reading
        if left < 0:
            what = f"a prefill of {T} tokens in chunks of {min(chunk, T)}"
            refusals.append(str(too_much(what, needed, budget, PREFILL_DO)))
        resident = resident_tokens(total=T, chunk=chunk, room=left, token_bytes=token_bytes)
        captured = config.capture and is_captured(model, machine)
        try:
            check_steps(config, [shape], budget=budget, is_captured=captured)
            step = foreseen_shape(config, shape, budget) if captured else None
        except CapacityError as error:
            refusals.append(str(error))
    if step is not None:
        steady = steady_bytes(config, shape)
        held = pool_parts(config, shape, step, steady, LIBRARY_BYTES)
        device = {"index": held["index"], "pool": held["pages"]}
        device["steady zone"] = held["steady zones"]
        device["working"] = held["steps"] + held["growth"] + held["libraries"]
    return Needs(
        device={"weights": weights, "windows": windows, **device},
        prefill=weights + windows + reading + resident * token_bytes,
        prefill_chunk=chunk,
        resident_tokens=resident,
        cache=cache,
        step=step,
        refusals=refusals,
    )


def _forward_bytes(model: ModelShape, shape: CacheShape, num_tokens: int) -> int:
    return forward_bytes(
        num_tokens * shape.batch,
        hidden=model.hidden,
        # of three matrices together, as `forward_bytes` has a block
        inner=-(-model.intermediate // 3),
        num_queries=model.q_heads,
        kv_heads=model.kv_heads,
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
