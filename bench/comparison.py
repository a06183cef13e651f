"""What the benchmarks of systems at several context lengths share: their flags, lengths as text,
and what becomes of a system that does not fit."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from decode_model import SHAPES, release_memory
from decode_result import Result

from wavekv.errors import CapacityError

UNITS = {"K": 1 << 10, "M": 1 << 20}


def context_length(text: str) -> int:
    """Tokens of "131072", "128K" or "1M"."""
    text = text.strip().upper()
    factor = UNITS.get(text[-1:], 1)
    return int(text[:-1] if factor > 1 else text) * factor


def context_name(tokens: int) -> str:
    """The shortest of the forms that `context_length` reads."""
    for unit, size in reversed(UNITS.items()):
        if tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)


def share_or_size(text: str) -> float | str:
    """A share, or text such as "8GiB"."""
    try:
        return float(text)
    except ValueError:
        return text


def attempted(
    run: Callable[[], Result], name: str, tokens: int, batch: int, settings: str = ""
) -> Result:
    """What `run` returns, or where memory does not suffice a result without times whose notes are
    `settings` and why. What it held is released."""
    try:
        result = run()
    except (torch.OutOfMemoryError, CapacityError) as error:
        result = Result(name, tokens, batch, notes=f"{settings}{str(error).splitlines()[0]}")
    release_memory()
    return result


def add_comparison_flags(
    parser: ArgumentParser, systems: Collection[str], contexts: str, json: Path
) -> None:
    """What to compare, on what, and where it is written; `contexts` and `json` are defaults."""
    on_cuda = torch.cuda.is_available()
    parser.add_argument("--contexts", default=contexts, help="lengths such as 32K,128K,1M")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, help="default: those of the shape")
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b" if on_cuda else "tiny")
    parser.add_argument("--which", default=",".join(systems), help="systems, in this order")
    parser.add_argument("--device", default="cuda" if on_cuda else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=json)


def parse_flags(parser: ArgumentParser, systems: Collection[str]) -> Namespace:
    """The arguments, `which` and `contexts` as lists; an unknown system ends the program."""
    args = parser.parse_args()
    args.which = [name.strip() for name in args.which.split(",")]
    args.contexts = [context_length(text) for text in args.contexts.split(",")]
    unknown = [name for name in args.which if name not in systems]
    if unknown:
        parser.error(f"unknown systems {unknown}; there are {list(systems)}")
    return args
