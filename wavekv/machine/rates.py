"""The rates of a machine, each as measured through the code that uses it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from wavekv.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes a second unless the name says otherwise; None where the machine has no such thing."""

    host_read: float
    """Reading CPU memory, all threads."""
    page_build: float
    """Tokens of a KV head of 128 dimensions a second that become pages."""
    matmul_flops: float
    """FLOP a second of large matrix products: bfloat16 on CUDA, float32 on a CPU."""
    attention_flops: dict[str, float]
    """The same of attention of many queries to a block of keys, by head dimension."""
    disk_sequential: float | None = None
    disk_random: float | None = None
    """8 KiB at random places, one at a time."""
    device_copy: float | None = None
    """A copy inside the device, bytes read and written."""
    h2d: float | None = None
    """Pinned host memory to the device."""
    d2h: float | None = None
    fetch: float | None = None
    """Single pages from pinned memory, by the kernel that a decode step uses."""
    pin_seconds_per_gib: float | None = None

    @property
    def has_device(self) -> bool:
        """Whether these are of a machine with a CUDA device."""
        return self.device_copy is not None

    def attention_of(self, head_dim: int) -> float:
        """FLOP a second of attention at the measured head dimension that is nearest."""
        nearest = min(self.attention_flops, key=lambda dim: abs(int(dim) - head_dim))
        return self.attention_flops[nearest]

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Rates:
        """The rates that `to_dict` gave; names that are unknown are left out.

        Raises:
            ConfigError: a rate is missing, or no positive number.
        """
        given: dict[str, Any] = {}
        for field in fields(cls):
            value = values.get(field.name)
            if field.name == "attention_flops":
                is_right = _are_rates(value)
            else:
                is_right = _is_rate(value) or (value is None and field.default is None)
            if not is_right:
                raise ConfigError(
                    f"expected a positive {field.name} among the rates of the machine, got "
                    f"{value!r}; make the file anew by `wavekv doctor --json --again`"
                )
            given[field.name] = value
        return cls(**given)


def _is_rate(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _are_rates(value: object) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(str(dim).isdecimal() and _is_rate(rate) for dim, rate in value.items())
    )
