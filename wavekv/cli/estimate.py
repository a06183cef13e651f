"""`wavekv estimate`: what a model and a context take of this machine, or of another."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from wavekv.cli.table import print_table
from wavekv.config import OffloadConfig
from wavekv.errors import ConfigError
from wavekv.estimate import Estimate, estimate, read_model
from wavekv.estimate.builtin import BUILTIN
from wavekv.estimate.model import dtype_of
from wavekv.estimate.quantity import parse_tokens, tokens_text
from wavekv.estimate.seconds import Prediction
from wavekv.machine.record import MachineRecord, measured_machine

_SETTINGS = ("budget", "host_dtype", "cpu_budget", "device_budget", "prefill_chunk", "compile")
"""Options that are fields of `OffloadConfig`."""


def add_parser(commands: Any) -> None:
    """Add the `estimate` subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "estimate", help="memory and time of a model and a context, without loading any weights"
    )
    names = ", ".join(BUILTIN)
    parser.add_argument(
        "--model", required=True, metavar="CONFIG", help=f"config.json, its folder, or {names}"
    )
    parser.add_argument("--tokens", required=True, help="context length: 100000, 128K, 1M")
    parser.add_argument("--batch", type=int, default=1, help="sequences (1)")
    parser.add_argument("--dtype", help="of weights and keys (that of the config)")
    parser.add_argument("--budget", type=_number, help="share or count of tokens to retrieve")
    parser.add_argument("--host-dtype", help="how pages are stored: model, int8, int4, int4-int2")
    parser.add_argument(
        "--hits", type=float, help="share of chosen pages in the pool (0.85; 0 if none recurs)"
    )
    for name in ("cpu", "device"):
        parser.add_argument(f"--{name}-budget", type=_number, help="bytes, 8GiB, or a share")
    parser.add_argument("--prefill-chunk", type=int, help="tokens of one forward of a prefill")
    # None unless given, as the others: the default is the config's
    parser.add_argument("--compile", action="store_true", default=None, help="as the setting does")
    parser.add_argument(
        "--machine", type=Path, metavar="FILE", help="rates of another machine, from its doctor"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Say what is foreseen; 1 if it does not fit."""
    if options.batch < 1:
        raise ConfigError(f"batch must be at least 1, got {options.batch}")
    given = {name: getattr(options, name) for name in _SETTINGS}
    config = OffloadConfig(**{name: value for name, value in given.items() if value is not None})
    model, num_tokens = read_model(options.model), parse_tokens(options.tokens)
    dtype = None if options.dtype is None else dtype_of(options.dtype)
    if options.machine is None:
        machine = measured_machine()[0]
    else:
        machine = MachineRecord.read(options.machine)
    foreseen = estimate(
        model,
        config,
        machine,
        num_tokens=num_tokens,
        batch=options.batch,
        dtype=dtype,
        hits=options.hits,
    )
    if options.json:
        print(json.dumps(foreseen.to_dict()))
    else:
        _show(foreseen)
    return int(bool(foreseen.misfits))


def _show(it: Estimate) -> None:
    needs, shape, machine = it.needs, it.shape, it.machine
    cache, where = needs.cache, machine.device or "CPU"
    print(
        f"{it.model.name}, {tokens_text(shape.num_tokens)} tokens x {shape.batch}, "
        f"{str(shape.dtype).removeprefix('torch.')}, budget {it.config.budget}, on {where}\n"
    )
    rows = [(name, _gib(size), "") for name, size in needs.device.items() if size]
    index = ", ".join(f"{name} {_gib(size)}" for name, size in cache.index.items())
    room = f"of {_gib(machine.device_memory)}" if machine.device_memory else "in host memory"
    print_table(
        [
            ("device", "", ""),
            *((f"  {name}", *rest) for name, *rest in rows),
            ("  while decoding", _gib(needs.decode), ""),
            ("  while prefilling", _gib(needs.prefill), ""),
            ("  most at a time", _gib(needs.total), room),
            ("host", "", ""),
            ("  pages", _gib(cache.host_pages), ""),
            ("  page tables", _gib(cache.host_tables), ""),
            ("  together", _gib(needs.host), f"of {_gib(machine.host_memory)}"),
            ("disk", _gib(0), ""),
            ("bus, for a token", f"{it.bus_bytes / shape.batch / 2**20:.1f} MiB", ""),
        ]
    )
    print(f"\nindex after the prefill: {index}\n")
    _show_time("prefill", it.prefill, 1.0, "s")
    _show_time("decode step", it.decode, 1e3, "ms")
    if shape.batch > 1:
        print(f"  for a token {1e3 * it.decode.seconds / shape.batch:.2f} ms")
    print()
    for misfit in it.misfits:
        print(f"does not fit: {misfit.what}\n  what to do: {misfit.do}")
    if it.fitting_tokens is None:
        print("fits")
    elif it.fitting_tokens:
        print(f"the longest context that fits: {tokens_text(it.fitting_tokens)} tokens")
    else:
        print("no context fits: a smaller model, or a larger machine")


def _show_time(name: str, it: Prediction, scale: float, unit: str) -> None:
    floor, took = it.floor * scale, it.seconds * scale
    print(f"{name}: {took:.3g} {unit} = floor {floor:.3g} {unit} x {it.factor:.2f}")
    print(f"  {it.how}")
    if it.parts:
        parts = (f"{part} {seconds * scale:.3g}" for part, seconds in it.parts.items())
        print(f"  {unit}: {', '.join(parts)}")


def _number(text: str) -> float | int | str:
    """A count, a share, or a size with a unit."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f} GiB"
