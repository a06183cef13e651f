"""Foreseen times and sizes against those that were measured on an H100 (bench/results)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wavekv.config import OffloadConfig
from wavekv.estimate import Estimate, estimate, read_model
from wavekv.machine import MachineRecord

RESULTS = Path(__file__).parents[2] / "bench" / "results"
MACHINE = MachineRecord.read(RESULTS / "machine_h100.json")


def rows_of(file: str, **wanted: Any) -> list[dict[str, Any]]:
    """The rows of a result that have these values."""
    rows = json.loads((RESULTS / f"{file}.json").read_text())["rows"]
    return [row for row in rows if all(row.get(k) == v for k, v in wanted.items())]


def settings(row: dict[str, Any]) -> dict[str, Any]:
    names = "budget", "refine", "host_dtype", "device_budget"
    return {name: row[name] for name in names}


STEPS = [
    *rows_of("decode_contexts", name="retrieval"),
    *rows_of("million_decode", name="retrieval"),
]
"""Over filled pages, whose queries choose two thirds of the pages again."""
ALIKE = [row for row in STEPS if row["device_budget"] == 0.9]
"""Those whose pool is as large as pays."""
PROMPTS = [
    ("million_prefill", "llama-3.2-1b", "model"),
    ("million_prefill_8b", "llama-3.1-8b", "int8"),
]
"""Over random tokens, whose steps choose pages anew."""


def name_of(row: dict[str, Any]) -> str:
    return f"{row['tokens']}-{row['budget']}-{row['device_budget']}"


def foreseen(row: dict[str, Any], hits: float | None = None) -> Estimate:
    config = OffloadConfig(compile=True, **settings(row))
    model = read_model("llama-3.1-8b")
    return estimate(model, config, MACHINE, num_tokens=row["tokens"], batch=1, hits=hits)


def test_there_is_something_to_hold_against() -> None:
    assert len(STEPS) == 7
    assert len(ALIKE) == 6


@pytest.mark.parametrize("row", ALIKE, ids=name_of)
def test_decode_steps(row: dict[str, Any]) -> None:
    step = foreseen(row).decode
    assert step.seconds == pytest.approx(1e-3 * row["ms_median"], rel=0.06)
    assert step.floor == pytest.approx(1e-3 * row["floor_ms"], rel=0.1)


@pytest.mark.parametrize("row", STEPS, ids=name_of)
def test_decode_steps_of_known_hits(row: dict[str, Any]) -> None:
    step = foreseen(row, row["hit_rate"]).decode
    assert step.seconds == pytest.approx(1e-3 * row["ms_median"], rel=0.07)


@pytest.mark.parametrize("row", STEPS, ids=name_of)
def test_bytes(row: dict[str, Any]) -> None:
    it = foreseen(row, row["hit_rate"])
    assert it.needs.cache.host_pages == pytest.approx(row["host_bytes"], rel=1e-3)
    assert it.bus_bytes == pytest.approx(row["pcie_bytes"], rel=0.13)
    # measured with the queries of the walk and what an allocator keeps; foreseen with what moves
    # while an engine is made and what a prefill leaves in steady zones
    assert it.needs.decode == pytest.approx(row["device_bytes"], rel=0.025)


@pytest.mark.parametrize(("name", "model", "host_dtype"), PROMPTS)
def test_steps_after_a_prompt(name: str, model: str, host_dtype: str) -> None:
    (row,) = rows_of(name, name="decode")
    config = OffloadConfig(compile=True, host_dtype=host_dtype)
    # random tokens find nothing in the pool
    it = estimate(read_model(model), config, MACHINE, num_tokens=row["tokens"], batch=1, hits=0.0)
    assert it.decode.seconds == pytest.approx(1e-3 * row["ms_median"], rel=0.06)


@pytest.mark.parametrize(("name", "model", "host_dtype"), PROMPTS)
def test_prefills(name: str, model: str, host_dtype: str) -> None:
    (row,) = rows_of(name, name="prefill")
    config = OffloadConfig(host_dtype=host_dtype)
    it = estimate(read_model(model), config, MACHINE, num_tokens=row["tokens"], batch=1)
    assert it.prefill.seconds == pytest.approx(row["seconds"], rel=0.25)
    assert it.needs.prefill == pytest.approx(row["device_bytes"], rel=0.1)
    assert it.needs.cache.host_pages == pytest.approx(row["host_bytes"], rel=1e-3)
