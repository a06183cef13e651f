"""The benchmarks run to their end, at the smallest size, and say what they measured."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"
TINY = ("--device", "cpu", "--shape", "tiny", "--layers", "2")
STEPS = ("--steps", "4", "--repeats", "2", "--warmup", "1")
BUNDLED = ("--tokens", "2048", "--questions", "1")
FEW = ("--tokens", "2048", "--contexts", "1", "--per-context", "1")
PROGRAMS = {
    "million decode": (
        *("million.py", "decode", *TINY, *STEPS, "--tokens", "4K", "--budgets", "0.02"),
        *("--prefetches", "runners-up", "--device-budgets", "0.9"),
    ),
    "million prefill": ("million.py", "prefill", *TINY, "--tokens", "4K", "--steps", "4"),
    "prefill": ("prefill.py", *TINY, "--contexts", "4K", "--repeats", "1"),
    "misses": ("misses.py", *BUNDLED, "--caps", "8"),
    "context": (
        *("context.py", *BUNDLED, "--repeats", "1", "--size", "8MiB", "--batches", "64"),
        *("--page-bytes", "4096", "--folder", ".", "--steps", "10"),
        # saving and loading in each form is what tests/model_adapters/test_saving.py does
        *("--parts", "files,pages,first,tiers,steps"),
    ),
    "reuse": ("reuse.py", *BUNDLED, "--further", "1"),
    "device tokens": ("device_tokens.py", *BUNDLED, "--device", "cpu"),
    "accuracy": ("accuracy.py", *FEW, "--table", "table.md"),
    "host dtypes": ("host_dtypes.py", *FEW, "--table", "table.md"),
}


def numbers_of(value: Any) -> Iterator[float]:
    """All numbers of a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from numbers_of(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def run(program: str, *flags: str, out: Path) -> Any:
    """What a benchmark writes to `out`."""
    to = "--out" if {"--table", "--folder"} & set(flags) else "--json"
    command = [sys.executable, BENCH / program, *flags, to, out]
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    ended = subprocess.run(command, capture_output=True, text=True, env=env, cwd=out.parent)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_benchmark_runs(name: str, tmp_path: Path) -> None:
    record = run(*PROGRAMS[name], out=tmp_path / "out.json")
    assert record.pop("machine")["commit"]
    measured = list(numbers_of(record))
    assert len(measured) > 10
    assert all(map(math.isfinite, measured))


@pytest.mark.slow
def test_rows_of_a_decode_are_of_their_systems(tmp_path: Path) -> None:
    systems = ["full", "retrieval", "exact"]
    record = run(
        "decode.py",
        *TINY,
        *STEPS,
        "--contexts",
        "4K",
        "--which",
        ",".join(systems),
        out=tmp_path / "out.json",
    )
    rows = record["rows"]
    assert [row["name"] for row in rows] == systems
    assert all(row["ms_median"] > 0 for row in rows)
    full, retrieval, exact = rows
    assert full["host_bytes"] == 0
    # exact steps bring all pages, those of retrieval less than that, and not nothing
    assert exact["pcie_bytes"] == exact["host_bytes"]
    assert 0 < retrieval["pcie_bytes"] < exact["pcie_bytes"]
