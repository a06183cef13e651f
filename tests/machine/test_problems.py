"""Problems are seen, and a sound machine has none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from wavekv.machine import Rates
from wavekv.machine.environment import Environment
from wavekv.machine.problems import problems

SOUND = Environment(
    wavekv="0.1.0",
    python="3.12.3",
    platform="Linux",
    host="here",
    libraries={"torch": "2.11.0", "transformers": "5.17.0", "triton": "3.6.0", "numba": "0.68.0"},
    cores=16,
    threads=16,
    memory=1 << 37,
    memory_available=1 << 36,
    cgroup_limit=None,
    memlock_limit=None,
    torch_cuda="13.0",
    device="a GPU",
    device_memory=80 << 30,
    device_free=79 << 30,
    capability="9.0",
    can_pin=True,
    captured_refusal=None,
)
RATES = Rates(
    host_read=1e11,
    disk_sequential=1e9,
    disk_random=1e8,
    page_build=1e7,
    matmul_flops=6e14,
    attention_flops={"128": 4e14},
    device_copy=3e12,
    h2d=5e10,
    d2h=5e10,
    fetch=5e10,
)


def test_a_sound_machine_has_none() -> None:
    assert problems(SOUND, RATES) == []


@pytest.mark.parametrize(
    ("change", "what", "do"),
    [
        ({"libraries": SOUND.libraries | {"torch": "2.8.1"}}, "torch is 2.8.1", "2.9 or newer"),
        ({"libraries": SOUND.libraries | {"transformers": "4.50.0"}}, "4.50.0", ">=5.17,<6"),
        ({"libraries": SOUND.libraries | {"transformers": "6.0.0"}}, "6.0.0", ">=5.17,<6"),
        ({"libraries": SOUND.libraries | {"transformers": None}}, "not installed", "pip install"),
        ({"libraries": SOUND.libraries | {"numba": None}}, "numba is not", "pip install numba"),
        ({"device": None}, "built for CUDA 13.0 and sees no device", "nvidia-smi"),
        ({"captured_refusal": "triton is not installed"}, "not captured", "pip install triton"),
        ({"can_pin": False}, "cannot be pinned", "ulimit -l"),
        ({"device_free": 10 << 30}, "70.0 GiB of device memory", "CUDA_VISIBLE_DEVICES"),
        ({"threads": 1}, "torch uses 1 of 16 cores", "OMP_NUM_THREADS"),
    ],
)
def test_problems_of_the_environment(change: dict, what: str, do: str) -> None:
    (found,) = problems(replace(SOUND, **change), RATES if change.get("device", 1) else None)
    assert what in found.what
    assert do in found.do


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"disk_sequential": None, "disk_random": None}, "temporary file"),
        ({"h2d": 3e9, "fetch": 3e9}, "moves 3.0 GB/s"),
        ({"fetch": 2e10}, "fetched at 20.0 GB/s"),
    ],
)
def test_problems_of_the_bus(change: dict, what: str) -> None:
    (found,) = problems(SOUND, replace(RATES, **change))
    assert what in found.what
