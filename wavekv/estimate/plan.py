"""Everything that is foreseen of a model and a context on a machine, and what does not fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from wavekv.config import OffloadConfig
from wavekv.errors import ConfigError
from wavekv.estimate.decode import decode_step
from wavekv.estimate.fit import Misfit, longest_that_fits, misfits
from wavekv.estimate.model import ModelShape
from wavekv.estimate.needs import Needs, is_captured, needs_of, window_bytes
from wavekv.estimate.prefill import prefill_time
from wavekv.estimate.seconds import Prediction
from wavekv.estimate.step_bytes import step_bytes
from wavekv.machine.record import MachineRecord
from wavekv.offload.sizes import CacheShape


@dataclass(frozen=True, slots=True)
class Estimate:
    """What `wavekv estimate` says."""

    model: ModelShape
    shape: CacheShape
    config: OffloadConfig
    machine: MachineRecord
    needs: Needs
    bus_bytes: int
    """Of a decode step, over the bus."""
    decode: Prediction
    """Of a step: a token of each sequence."""
    prefill: Prediction
    misfits: list[Misfit]
    fitting_tokens: int | None
    """The longest context that fits, where this one does not; 0 if none does."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        needs, cache = self.needs, self.needs.cache
        return {
            "model": self.model.name,
            "tokens": self.shape.num_tokens,
            "batch": self.shape.batch,
            "dtype": str(self.shape.dtype).removeprefix("torch."),
            "budget": self.config.budget,
            "prefill_chunk": needs.prefill_chunk,
            "machine": {"device": self.machine.device, "key": self.machine.key},
            "device_bytes": {
                **{name.replace(" ", "_"): size for name, size in needs.device.items()},
                "index_parts": {name.replace(" ", "_"): n for name, n in cache.index.items()},
                "while_decoding": needs.decode,
                "while_prefilling": needs.prefill,
                "total": needs.total,
                "available": self.machine.device_memory,
                "resident_tokens_while_prefilling": needs.resident_tokens,
            },
            "host_bytes": {
                "pages": cache.host_pages,
                "tables": cache.host_tables,
                "total": needs.host,
                "available": self.machine.host_memory,
            },
            "disk_bytes": 0,
            "pcie_bytes_per_token": self.bus_bytes // self.shape.batch,
            "decode_step": self.decode.to_dict(),
            "decode_seconds_per_token": self.decode.seconds / self.shape.batch,
            "prefill": self.prefill.to_dict(),
            "problems": [misfit._asdict() for misfit in self.misfits],
            "fitting_tokens": self.fitting_tokens,
        }


def estimate(
    model: ModelShape,
    config: OffloadConfig,
    machine: MachineRecord,
    *,
    num_tokens: int,
    batch: int = 1,
    dtype: torch.dtype | None = None,
    hits: float | None = None,
) -> Estimate:
    """Foresee a prefill of `num_tokens` for each of `batch` sequences, and the steps after it.

    dtype: of weights and keys; that of the model's config by default. hits: the share of chosen
    pages that the page pool has, 0 to 1; by default that of a text where two thirds of the pages
    are chosen again. Cost: below a second.

    Raises:
        ConfigError: hits is not a share.
    """
    shape = CacheShape(
        layers=model.offloaded,
        batch=batch,
        kv_heads=model.kv_heads,
        group=model.q_heads // model.kv_heads,
        head_dim=model.head_dim,
        dtype=dtype or model.dtype,
        num_tokens=num_tokens,
    )
    if hits is not None and not 0 <= hits <= 1:
        raise ConfigError(f"hits must be a share from 0 to 1, got {hits}")
    needs = needs_of(model, config, machine, shape)
    found = misfits(config, machine, needs)

    def fits(tokens: int) -> bool:
        shorter = replace(shape, num_tokens=tokens)
        return not misfits(config, machine, needs_of(model, config, machine, shorter))

    slots = None
    if machine.rates.has_device:
        slots = 0 if needs.step is None else needs.step.slots
    weights = model.step_parameters * shape.dtype.itemsize
    windows = window_bytes(model, shape)
    read = step_bytes(
        config,
        shape,
        needs.cache,
        weights=weights,
        windows=windows,
        slots=slots,
        hits=hits,
    )
    took = decode_step(
        read,
        model.layers,
        model.offloaded,
        machine.rates,
        is_compiled=config.compile,
        is_captured=is_captured(model, machine),
    )
    return Estimate(
        model=model,
        shape=shape,
        config=config,
        machine=machine,
        needs=needs,
        bus_bytes=read.fetched,
        decode=took,
        prefill=prefill_time(model, shape, needs, machine.rates),
        misfits=found,
        fitting_tokens=longest_that_fits(fits, num_tokens) if found else None,
    )
