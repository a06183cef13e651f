"""`wavekv doctor`: what this machine has, how fast it is, and what is wrong with it."""

from __future__ import annotations

import argparse
import json
from typing import Any

from wavekv.cli.table import print_table
from wavekv.machine.environment import Environment, describe
from wavekv.machine.problems import problems
from wavekv.machine.rates import Rates
from wavekv.machine.record import cache_file, measured_machine


def add_parser(commands: Any) -> None:
    """Add the `doctor` subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor", help="report the environment, measure this machine, and say what is wrong"
    )
    parser.add_argument("--again", action="store_true", help="measure anew what is known already")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Report this machine; 0 also where problems are found."""
    environment = describe()
    record, was_kept = measured_machine(environment, again=options.again)
    found = problems(environment, record.rates)
    if options.json:
        result = {
            "environment": environment.to_dict(),
            "machine": record.to_dict(),
            "was_kept": was_kept,
            "file": str(cache_file()),
            "problems": [problem._asdict() for problem in found],
        }
        print(json.dumps(result))
        return 0
    print_table(_environment_rows(environment))
    when = "measured before; --again measures anew" if was_kept else "measured now"
    print(f"\n{when} ({cache_file()})")
    print_table(_rate_rows(record.rates))
    print()
    for problem in found:
        print(f"problem: {problem.what}\n  what to do: {problem.do}")
    if not found:
        print("no problems found")
    return 0


def _environment_rows(it: Environment) -> list[tuple[str, str]]:
    versions = [(name, version or "not installed") for name, version in it.libraries.items()]
    device = "none"
    if it.device is not None:
        free, memory = _gib(it.device_free), _gib(it.device_memory)
        device = f"{it.device}, {free} of {memory} free, capability {it.capability}"
    captured = "yes" if it.captured_refusal is None else f"no: {it.captured_refusal}"
    return [
        ("wavekv", it.wavekv),
        ("python", f"{it.python}, {it.platform}"),
        *versions,
        ("cores", f"{it.cores}, torch uses {it.threads}"),
        ("memory", f"{_gib(it.memory_available)} of {_gib(it.memory)} available"),
        ("limit of the cgroup", _gib(it.cgroup_limit, "none")),
        ("locked memory", _gib(it.memlock_limit, "no limit")),
        ("CUDA device", device),
        ("pinned memory", "yes" if it.can_pin else "no"),
        ("captured decode", captured),
    ]


def _rate_rows(rates: Rates) -> list[tuple[str, str]]:
    rows = [
        ("host memory, read", _gb(rates.host_read)),
        ("disk, in order", _gb(rates.disk_sequential)),
        ("disk, 8 KiB at random", _gb(rates.disk_random)),
        ("pinned, to the device", _gb(rates.h2d)),
        ("pinned, from the device", _gb(rates.d2h)),
        ("pages fetched by a kernel", _gb(rates.fetch)),
        ("device copy, read + write", _gb(rates.device_copy)),
        ("pinning", _of(rates.pin_seconds_per_gib, 1, "s/GiB")),
        ("matrix products", _of(rates.matmul_flops, 1e-12, "TFLOP/s")),
    ]
    for dim, rate in rates.attention_flops.items():
        rows.append((f"attention of a prefill, D {dim}", _of(rate, 1e-12, "TFLOP/s")))
    rows.append(("pages built", _of(rates.page_build, 1e-6, "M tokens/s of a KV head")))
    return [row for row in rows if row[1]]


def _gb(rate: float | None) -> str:
    return _of(rate, 1e-9, "GB/s")


def _of(rate: float | None, factor: float, unit: str) -> str:
    return "" if rate is None else f"{rate * factor:.3g} {unit}"


def _gib(size: int | None, otherwise: str = "") -> str:
    return otherwise if size is None else f"{size / 2**30:.3g} GiB"
