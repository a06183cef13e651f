"""A machine and its rates, kept in a file of the user's cache folder."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wavekv.errors import ConfigError
from wavekv.machine.environment import Environment, describe
from wavekv.machine.measure import measure
from wavekv.machine.rates import Rates

VERSION = 1
"""Of the file. Another one is measured anew."""


@dataclass(frozen=True, slots=True)
class MachineRecord:
    """What sizes and times are held against."""

    key: dict[str, str]
    """What the rates belong to: device, torch and host."""
    rates: Rates
    device: str | None
    device_memory: int | None
    """Bytes that a process may use: without what CUDA itself takes, and other processes do."""
    host_memory: int
    """Bytes that a process may use."""

    def to_dict(self) -> dict[str, Any]:
        """As the file keeps it."""
        return {
            "version": VERSION,
            "key": self.key,
            "device": self.device,
            "device_memory": self.device_memory,
            "host_memory": self.host_memory,
            "rates": self.rates.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Any) -> MachineRecord:
        """The record that `to_dict` gave.

        Raises:
            ConfigError: it is not one, or of another version.
        """
        if not isinstance(values, dict) or values.get("version") != VERSION:
            raise ConfigError(
                f"expected a machine file of version {VERSION}, as `wavekv doctor` writes it; "
                "make it anew by `wavekv doctor --again`"
            )
        rates, host = values.get("rates"), values.get("host_memory")
        if not isinstance(rates, dict) or not isinstance(host, int):
            raise ConfigError(
                "expected rates and host_memory in the machine file; make it anew by "
                "`wavekv doctor --again`"
            )
        key = values.get("key")
        return cls(
            key=key if isinstance(key, dict) else {},
            rates=Rates.from_dict(rates),
            device=values.get("device"),
            device_memory=values.get("device_memory"),
            host_memory=host,
        )

    @classmethod
    def read(cls, path: Path) -> MachineRecord:
        """The record in a file.

        Raises:
            ConfigError: the file is none, naming it.
            OSError: it cannot be read.
        """
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error

    def write(self, path: Path) -> None:
        """Replace the file, at once and whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, delete=False, encoding="utf-8"
        ) as file:
            file.write(json.dumps(self.to_dict(), indent=1) + "\n")
        os.replace(file.name, path)


def cache_file() -> Path:
    """Where the record of this machine is kept."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "wavekv" / "machine.json"


def measured_machine(
    environment: Environment | None = None, *, again: bool = False
) -> tuple[MachineRecord, bool]:
    """This machine, measured before (True) or now (False). again: measure in any case.

    Memory is what is there now. A file that cannot be written is no error: it is measured again.
    """
    environment = environment or describe()
    key = {
        "device": environment.device or "cpu",
        "torch": environment.libraries["torch"] or "",
        "host": environment.host,
    }
    rates = None if again else _kept_rates(key)
    was_kept = rates is not None
    record = MachineRecord(
        key=key,
        rates=rates or measure(environment),
        device=environment.device,
        device_memory=environment.device_free,
        host_memory=environment.memory_available,
    )
    if not was_kept:
        with suppress(OSError):
            record.write(cache_file())
    return record, was_kept


def _kept_rates(key: dict[str, str]) -> Rates | None:
    try:
        kept = MachineRecord.read(cache_file())
    except (ConfigError, OSError):
        return None
    return kept.rates if kept.key == key else None
