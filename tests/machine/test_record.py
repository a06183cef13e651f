"""The file that keeps the rates of a machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from wavekv.errors import ConfigError
from wavekv.machine import MachineRecord, Rates, measured_machine
from wavekv.machine.environment import Environment, describe
from wavekv.machine.record import VERSION, cache_file

RATES = Rates(
    host_read=1e10,
    disk_sequential=1e9,
    disk_random=1e8,
    page_build=1e5,
    matmul_flops=1e11,
    attention_flops={"64": 5e10, "128": 6e10},
)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Environment]:
    """A cache folder of its own; grows with every measurement, which is no real one."""
    done: list[Environment] = []

    def measure(environment: Environment) -> Rates:
        done.append(environment)
        return replace(RATES, host_read=float(len(done)))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("wavekv.machine.record.measure", measure)
    return done


def test_rates_are_measured_once(measured: list[Environment], tmp_path: Path) -> None:
    first, was_kept = measured_machine()
    assert not was_kept
    assert cache_file() == tmp_path / "wavekv" / "machine.json"
    second, was_kept = measured_machine()
    assert was_kept
    assert (second.rates, second.key) == (first.rates, first.key)
    assert len(measured) == 1
    third, was_kept = measured_machine(again=True)
    assert not was_kept
    assert third.rates.host_read == 2.0
    assert measured_machine()[0].rates == third.rates


@pytest.mark.parametrize(
    "change",
    [{"device": "another"}, {"host": "another"}, {"libraries": {"torch": "0.1"}}],
    ids=str,
)
def test_rates_of_another_machine_are_not_its_own(
    measured: list[Environment], change: dict[str, object]
) -> None:
    here = describe()
    measured_machine(here)
    measured_machine(replace(here, **change))
    assert len(measured) == 2


def test_memory_is_that_of_now(measured: list[Environment]) -> None:
    here = describe()
    measured_machine(replace(here, memory_available=5))
    record, was_kept = measured_machine(replace(here, memory_available=7))
    assert was_kept
    assert record.host_memory == 7


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 0}', '{"version": 1, "rates": {}}'])
def test_a_damaged_file_is_replaced(measured: list[Environment], text: str) -> None:
    cache_file().parent.mkdir()
    cache_file().write_text(text)
    assert not measured_machine()[1]
    assert json.loads(cache_file().read_text())["version"] == VERSION
    assert measured_machine()[1]


def test_a_folder_that_cannot_be_written_is_no_error(
    measured: list[Environment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert measured_machine()[0].rates.host_read == 1.0
    assert measured_machine()[0].rates.host_read == 2.0


def test_without_the_variable_it_is_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/somewhere")
    assert cache_file() == Path("/somewhere/.cache/wavekv/machine.json")


def test_a_record_and_back(tmp_path: Path) -> None:
    record = MachineRecord({"device": "d"}, RATES, "d", 1 << 30, 1 << 31)
    record.write(tmp_path / "a" / "m.json")
    assert MachineRecord.read(tmp_path / "a" / "m.json") == record
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["m.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 7}, "machine file of version 1"),
        ({"rates": None}, "expected rates and host_memory"),
        ({"host_memory": "much"}, "expected rates and host_memory"),
        ({"rates": {}}, "positive host_read among the rates"),
        ({"rates": RATES.to_dict() | {"fetch": -1}}, "positive fetch .* got -1"),
        ({"rates": RATES.to_dict() | {"matmul_flops": None}}, "positive matmul_flops"),
        ({"rates": RATES.to_dict() | {"attention_flops": {}}}, "positive attention_flops"),
        ({"rates": RATES.to_dict() | {"attention_flops": {"x": 1}}}, "positive attention_flops"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.json"
    record = MachineRecord({}, RATES, None, None, 1 << 31)
    path.write_text(json.dumps(record.to_dict() | change))
    with pytest.raises(ConfigError, match=f"m.json: .*{message}"):
        MachineRecord.read(path)


def test_the_nearest_head_dimension_counts() -> None:
    assert [RATES.attention_of(dim) for dim in (32, 80, 112, 256)] == [5e10, 5e10, 6e10, 6e10]
    assert not RATES.has_device
