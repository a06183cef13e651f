"""What keeps wavekv from running, or from running well, on a machine, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from wavekv.machine.environment import Environment
from wavekv.machine.rates import Rates

_TORCH = (2, 9)
_TRANSFORMERS = (5, 17), (6, 0)
_SLOW_BUS = 10e9
"""Bytes a second: a fifth of PCIe 5 x16."""
_LEAST_FETCH = 0.6
"""Of a plain copy."""


class Problem(NamedTuple):
    """One of them."""

    what: str
    do: str


def problems(environment: Environment, rates: Rates | None) -> list[Problem]:
    """All that are found, the gravest first."""
    return [*_of_libraries(environment), *_of_device(environment), *_of_rates(environment, rates)]


def _of_libraries(environment: Environment) -> Iterator[Problem]:
    torch, transformers = (_numbers(environment.libraries[n]) for n in ("torch", "transformers"))
    if torch is not None and torch < _TORCH:
        yield Problem(f"torch is {environment.libraries['torch']}", "install torch 2.9 or newer")
    if transformers is None:
        yield Problem("transformers is not installed", "pip install 'transformers>=5.17,<6'")
    elif not _TRANSFORMERS[0] <= transformers < _TRANSFORMERS[1]:
        yield Problem(
            f"transformers is {environment.libraries['transformers']}",
            "pip install 'transformers>=5.17,<6'",
        )
    if environment.libraries["numba"] is None:
        yield Problem("numba is not installed: the kernels for CPUs need it", "pip install numba")


def _of_device(environment: Environment) -> Iterator[Problem]:
    if environment.device is None:
        if environment.torch_cuda is not None:
            yield Problem(
                f"torch is built for CUDA {environment.torch_cuda} and sees no device",
                "look at nvidia-smi, the driver's version and CUDA_VISIBLE_DEVICES",
            )
        return
    if environment.captured_refusal is not None:
        yield Problem(
            f"decode steps are not captured: {environment.captured_refusal}; each takes some ten "
            "times as long",
            "pip install triton",
        )
    if not environment.can_pin:
        yield Problem(
            "memory cannot be pinned: no pages can be kept for the device",
            "raise the limit of locked memory (ulimit -l unlimited) or that of the container",
        )
    assert environment.device_memory is not None
    assert environment.device_free is not None
    if environment.device_free < environment.device_memory // 2:
        taken = (environment.device_memory - environment.device_free) / 2**30
        yield Problem(
            f"{taken:.1f} GiB of device memory are taken by others",
            "end them (nvidia-smi names them), or choose another device by CUDA_VISIBLE_DEVICES",
        )


def _of_rates(environment: Environment, rates: Rates | None) -> Iterator[Problem]:
    if environment.threads < environment.cores:
        yield Problem(
            f"torch uses {environment.threads} of {environment.cores} cores",
            "unset OMP_NUM_THREADS, or set it to the number of cores",
        )
    if rates is None:
        return
    if rates.disk_random is None:
        yield Problem(
            "no temporary file of 128 MiB can be written and read",
            "free space where temporary files go, or name another folder by TMPDIR",
        )
    if rates.h2d is None:
        return
    if rates.h2d < _SLOW_BUS:
        yield Problem(
            f"the bus to the device moves {rates.h2d / 1e9:.1f} GB/s",
            "look whether the card has all its lanes (nvidia-smi -q -d PERFORMANCE,PCIE), and "
            "whether other processes use the bus",
        )
    if rates.fetch is not None and rates.fetch < _LEAST_FETCH * rates.h2d:
        yield Problem(
            f"single pages are fetched at {rates.fetch / 1e9:.1f} GB/s, whole copies at "
            f"{rates.h2d / 1e9:.1f}",
            "larger pages (page_size) help, as does memory on the node of the card "
            "(numactl --membind)",
        )


def _numbers(version: str | None) -> tuple[int, int] | None:
    """(major, minor)."""
    match = re.match(r"(\d+)\.(\d+)", version or "")
    return None if match is None else (int(match[1]), int(match[2]))
