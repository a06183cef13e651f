"""What fits, what does not, and what times are made of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavekv.config import OffloadConfig
from wavekv.errors import ConfigError
from wavekv.estimate import Estimate, estimate, read_model
from wavekv.estimate.decode import _FIRST_RANKING, decode_step
from wavekv.estimate.fit import STEP, longest_that_fits
from wavekv.estimate.model import ModelShape, model_shape
from wavekv.estimate.prefill import attention_flops, streamed_bytes
from wavekv.estimate.step_bytes import StepBytes, fetched_in_vain, hit_rate
from wavekv.machine import MachineRecord

H100 = MachineRecord.read(Path(__file__).parents[2] / "bench" / "results" / "machine_h100.json")
CPU = replace(
    H100,
    device=None,
    device_memory=None,
    rates=replace(H100.rates, device_copy=None, h2d=None, d2h=None, fetch=None),
)
FIELDS = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
MODEL = model_shape("small", FIELDS)


def foresee(
    tokens: int = 65536,
    *,
    machine: MachineRecord = H100,
    model: ModelShape = MODEL,
    batch: int = 1,
    hits: float | None = None,
    **settings: object,
) -> Estimate:
    config = OffloadConfig(**settings)  # type: ignore[arg-type]
    return estimate(model, config, machine, num_tokens=tokens, batch=batch, hits=hits)


def test_what_fits_has_no_problems() -> None:
    it = foresee()
    assert it.misfits == []
    assert it.fitting_tokens is None
    assert it.needs.total == max(it.needs.prefill, it.needs.decode)
    assert it.needs.device["index"] > sum(it.needs.cache.index.values())


def test_the_longest_context_that_fits_the_host() -> None:
    small = replace(H100, host_memory=2 << 30)
    it = foresee(1 << 20, machine=small)
    assert [misfit.what.split(":")[0] for misfit in it.misfits] == ["host memory for pages"]
    assert "larger cpu_budget" in it.misfits[0].do
    assert it.fitting_tokens
    assert foresee(it.fitting_tokens, machine=small).misfits == []
    assert foresee(it.fitting_tokens + STEP, machine=small).misfits


def test_device_memory_and_pool_that_do_not_fit() -> None:
    it = foresee(1 << 20, machine=replace(H100, device_memory=2 << 30))
    assert "device memory" in " ".join(misfit.what for misfit in it.misfits)
    it = foresee(device_budget=1 << 20)
    assert [misfit.what for misfit in it.misfits] == ["device_budget is too small"] * 2
    assert "a prefill of 65536 tokens in chunks of 8192 needs" in it.misfits[0].do
    assert "raise device_budget" in it.misfits[0].do
    assert "a decode step needs" in it.misfits[1].do


def test_a_model_that_never_fits() -> None:
    assert foresee(machine=replace(H100, device_memory=1 << 20)).fitting_tokens == 0


def test_without_a_device_all_is_in_host_memory() -> None:
    it = foresee(machine=CPU)
    assert it.needs.device["pool"] == it.bus_bytes == 0
    assert it.misfits == []
    room = it.needs.total + it.needs.host
    assert foresee(machine=replace(CPU, host_memory=room)).misfits == []
    assert foresee(machine=replace(CPU, host_memory=room - 1)).misfits


def test_windows_step_without_a_graph() -> None:
    kinds = ["full_attention", "sliding_attention"] * 4
    model = model_shape("windows", FIELDS | {"layer_types": kinds, "sliding_window": 4096})
    it, plain = foresee(model=model), foresee()
    assert it.needs.step is None
    assert it.needs.device["windows"] == 4 * 2 * 4096 * 4 * 64 * 2
    assert it.needs.cache.host_pages * 2 == plain.needs.cache.host_pages
    assert "not captured" in it.decode.how
    assert it.decode.seconds > plain.decode.seconds
    # without a pool every chosen page is fetched
    assert it.bus_bytes > plain.bus_bytes


def test_json_is_one_flat_enough_object() -> None:
    record = foresee(batch=2).to_dict()
    assert json.loads(json.dumps(record)) == record
    device = record["device_bytes"]
    held = ("weights", "windows", "index", "pool", "steady_zone", "working")
    assert sum(device[name] for name in held) == device["while_decoding"]
    assert record["decode_seconds_per_token"] == record["decode_step"]["seconds"] / 2
    assert record["disk_bytes"] == 0


def test_a_step_waits_for_the_longer_of_bus_and_kernels() -> None:
    read = StepBytes(10**9, 10**8, 10**8, 10**8, 10**8, 10**7, 10**6, fetched=0)
    options = {"is_compiled": True, "is_captured": True}
    free = decode_step(read, 8, 8, H100.rates, **options)
    assert free.floor == pytest.approx(read.read / 3017e9)
    hidden = decode_step(replace(read, fetched=10**6), 8, 8, H100.rates, **options)
    assert hidden.seconds == free.seconds
    waited = decode_step(replace(read, fetched=10**9), 8, 8, H100.rates, **options)
    assert waited.seconds == pytest.approx(
        free.seconds
        - free.parts["estimate"]
        - (1 - _FIRST_RANKING) * free.parts["rank"]
        + waited.parts["fetch, beside these"]
    )
    eager = decode_step(read, 8, 8, H100.rates, is_compiled=False, is_captured=True)
    assert eager.seconds > free.seconds


def test_a_prefill_is_limited_by_arithmetic_or_the_bus() -> None:
    slow = replace(H100, rates=replace(H100.rates, h2d=1e9))
    options = {"prefill_chunk": 8192, "device_budget": "512MiB"}
    quick, bound = foresee(1 << 17, **options), foresee(1 << 17, machine=slow, **options)
    assert "limited by arithmetic" in quick.prefill.how
    assert "limited by the bus" in bound.prefill.how
    moved = streamed_bytes(bound.shape, bound.needs)
    assert bound.prefill.seconds == pytest.approx(moved / 1e9)
    assert bound.prefill.floor == quick.prefill.floor < quick.prefill.seconds


def test_operations_of_attention() -> None:
    assert attention_flops(MODEL, 1, 1000) == 8 * 4 * 16 * 64 * 1000 * 1000 // 2
    kinds = ["sliding_attention"] * 7 + ["full_attention"]
    windows = model_shape("a", FIELDS | {"layer_types": kinds, "sliding_window": 10})
    pairs = sum(min(t, 10) for t in range(1, 1001))
    flops = attention_flops(windows, 1, 1000) / (4 * 16 * 64)
    assert flops == pytest.approx(7 * pairs + 1000 * 1000 / 2, rel=1e-3)


def test_every_chunk_brings_back_the_pages_before_it() -> None:
    of_chunk = 8192 * 2 * 64 * 2 * 4 * 8
    it = foresee(8192 * 5, prefill_chunk=8192, device_budget=1 << 30)
    taken = it.needs.prefill - it.needs.device["weights"]
    assert 0 < it.needs.resident_tokens < 4 * 8192
    assert (1 << 30) - of_chunk // 8192 < taken <= 1 << 30
    it = foresee(8192 * 5, prefill_chunk=8192)
    assert it.needs.resident_tokens == 4 * 8192
    assert streamed_bytes(it.shape, it.needs) == 0
    none = replace(it.needs, resident_tokens=0)
    assert streamed_bytes(it.shape, none) == (1 + 2 + 3 + 4) * of_chunk
    some = replace(it.needs, resident_tokens=2 * 8192)
    assert streamed_bytes(it.shape, some) == (1 + 2) * of_chunk


def test_chunks_are_shorter_where_memory_is_short() -> None:
    assert foresee().needs.prefill_chunk == 32768
    assert foresee(machine=CPU).needs.prefill_chunk == 8192
    tight = replace(H100, device_memory=2 << 30)
    assert foresee(machine=tight).needs.prefill_chunk < 32768
    assert foresee(prefill_chunk=100).needs.prefill_chunk == 100


def test_hit_rates_of_pools() -> None:
    rates = [hit_rate(slots, 100, 10_000) for slots in (0, 100, 200, 10_000)]
    assert rates == sorted(rates)
    assert (rates[0], rates[-1]) == (0.0, 1.0)


def test_what_the_pool_has_need_not_cross_the_bus() -> None:
    by_hits = {hits: foresee(8192 * 16, hits=hits) for hits in (0.0, 0.5, 1.0)}
    moved = [it.bus_bytes for it in by_hits.values()]
    assert moved == sorted(moved, reverse=True)
    most = by_hits[0.0].needs.step.most
    rows = MODEL.offloaded * MODEL.kv_heads
    pages = by_hits[0.0].needs.cache.layout.page_bytes * rows * most
    # with what is fetched in vain
    assert pages < moved[0] < 1.3 * pages
    assert moved[2] < 0.1 * pages
    for hits in (-0.1, 1.1):
        with pytest.raises(ConfigError, match="from 0 to 1"):
            foresee(hits=hits)


def test_nothing_is_fetched_in_vain_without_slots_for_it() -> None:
    assert fetched_in_vain(100, 100, 0.5) == 0
    assert 0 < fetched_in_vain(150, 100, 0.5) < fetched_in_vain(400, 100, 0.5)
    assert fetched_in_vain(400, 100, 0.9) < fetched_in_vain(400, 100, 0.1)


@given(st.integers(0, 2000), st.integers(1, 3000))
def test_the_longest_that_fits_is_found(limit: int, asked: int) -> None:
    found = longest_that_fits(lambda tokens: tokens <= limit * STEP, asked * STEP)
    assert found == min(limit, asked - 1) * STEP


def test_nothing_is_fetched_in_vain_where_misses_are_bounded() -> None:
    free, bounded = (
        estimate(
            read_model("llama-3.1-8b"),
            OffloadConfig(max_misses=most),
            H100,
            num_tokens=1 << 17,
            batch=1,
        )
        for most in (None, 1 << 17)
    )
    assert bounded.bus_bytes < free.bus_bytes
