"""Measured rates are of what they say: the work is done, and the figures are of this world."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from wavekv.machine import host
from wavekv.machine.bus import random_fetch
from wavekv.machine.disk import disk_rates
from wavekv.machine.environment import describe
from wavekv.machine.measure import measure


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as a test has time for."""
    monkeypatch.setattr("wavekv.machine.disk._FILE_BYTES", 8 << 20)
    monkeypatch.setattr(host, "_MOST_BYTES", 1 << 26)


def test_disk_rates(little: None, tmp_path: Path) -> None:
    sequential, random = disk_rates(tmp_path)
    assert random > 1e5
    assert 1e6 < sequential < 1e12
    assert list(tmp_path.iterdir()) == []


def test_a_slow_disk_is_not_read_to_its_end(
    little: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wavekv.machine.disk._MOST_SECONDS", 0.0)
    assert all(rate > 0 for rate in disk_rates(tmp_path))


def test_a_disk_that_cannot_be_written_has_no_rates(
    little: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match="No such file"):
        disk_rates(tmp_path / "nowhere")

    def no_room() -> tuple[float, float]:
        raise OSError("no room")

    monkeypatch.setattr("wavekv.machine.measure.disk_rates", no_room)
    monkeypatch.setattr("wavekv.machine.measure.page_build", lambda _: 1.0)
    assert measure(describe()).disk_random is None


def test_a_file_system_that_refuses_to_read_around_its_cache(
    little: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct, whole = getattr(os, "O_DIRECT", 0), os.open

    def refuses(name: str, flags: int, *rest: int) -> int:
        if flags & direct:
            raise OSError(22, "Invalid argument")
        return whole(name, flags, *rest)

    monkeypatch.setattr("wavekv.machine.disk.os.open", refuses)
    assert all(rate > 0 for rate in disk_rates(tmp_path))


def test_host_rates(little: None) -> None:
    assert 1e8 < host.host_read() < 1e13


@pytest.mark.slow
def test_all_rates_of_a_machine(little: None) -> None:
    environment = describe()
    rates = measure(environment)
    assert rates.has_device == (environment.device is not None)
    assert set(rates.attention_flops) == {"64", "128"}
    assert type(rates).from_dict(rates.to_dict()) == rates


@pytest.mark.gpu
def test_rates_of_a_device() -> None:
    environment = describe()
    assert environment.can_pin
    assert environment.captured_refusal is None
    rates = measure(environment)
    assert rates.h2d is not None
    assert rates.fetch is not None
    assert rates.device_copy is not None
    assert 1e9 < rates.fetch < 2 * rates.h2d < rates.device_copy
    assert rates.matmul_flops > 1e12


def test_the_fetch_that_is_timed_brings_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wavekv.machine.bus._MISSES", 3)
    host_bytes = torch.randint(1, 255, (16 * 4096,), dtype=torch.uint8)
    run, pool = random_fetch(host_bytes, torch.device("cpu"))
    run()
    pages = host_bytes.view(16, 4096)
    brought = pool.pages.flatten(3).view(torch.uint8).reshape(-1, 4096)
    assert len(brought) == 24
    assert all(bool((pages == page).all(1).any()) for page in brought)


def test_the_environment_is_this_one() -> None:
    it = describe()
    assert it.libraries["torch"] == torch.__version__
    assert 0 < it.memory_available <= it.memory
    assert (it.device is None) != torch.cuda.is_available()
    if it.device is None:
        assert it.captured_refusal == "there is no CUDA device"
