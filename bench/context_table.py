"""The tables of the benchmark of saved contexts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Row = dict[str, Any]


def lines(record: dict[str, Any]) -> Iterator[str]:
    """What a record says, a table a part."""
    for part, columns in TABLES.items():
        if part not in record:
            continue
        yield ""
        yield _line(columns)
        yield _line(["---"] * len(columns))
        for row in record[part]["rows"]:
            yield _line(value(row) for value in columns.values())


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def _of(name: str, form: str = "") -> Callable[[Row], str]:
    """A field of a row; nothing where it has none."""
    return lambda row: format(row[name], form) if name in row else ""


def _mib(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row[name] / 2**20:.1f}" if name in row else ""


TABLES: dict[str, dict[str, Callable[[Row], str]]] = {
    "files": {
        "": _of("name"),
        "files": _of("files"),
        "MiB": _mib("nbytes"),
        "GB/s": _of("ours_gb_per_s", ".2f"),
        "raw disk, GB/s": _of("raw_gb_per_s", ".2f"),
        "of the raw disk": _of("ratio", ".2f"),
    },
    "pages": {
        "page": _of("page_bytes"),
        "files": _of("files"),
        "state": _of("state"),
        "batch": _of("batch"),
        "ms": _of("ours_ms", ".2f"),
        "plain pool, ms": _of("plain_ms", ".2f"),
        "of the pool's speed": _of("ratio", ".2f"),
    },
    "first": {
        "": _of("name"),
        "seconds": _of("seconds", ".3f"),
        "load": _of("load_seconds", ".3f"),
        "first step": _of("step_seconds", ".3f"),
        "of the prefill": _of("of_prefill", ".4f"),
        "pages read, MiB": _mib("page_bytes_read"),
    },
    "tiers": {
        "pages in": _of("name"),
        "in memory, MiB": _mib("host_nbytes"),
        "prefill, s": _of("prefill_seconds", ".2f"),
        "ms a token": _of("ms_per_token", ".2f"),
        "same answers": lambda row: f"{row['same_answers']} of {row['answers']}",
        "found in memory": _of("host_hit_rate", ".1%"),
        "read from disk, MiB": _mib("bytes_from_disk"),
    },
    "steps": {
        "pages": _of("name"),
        "first step, ms": _of("first_ms", ".1f"),
        "first quarter, ms": _of("early_ms", ".2f"),
        "last quarter, ms": _of("late_ms", ".2f"),
        "same tokens": lambda row: f"{row['same_tokens']} of {row['steps']}",
        "found on the device": _of("device_hit_rate", ".1%"),
        "of the others in memory": _of("host_hit_rate", ".1%"),
        "late pages": _of("late_pages"),
        "read from disk, MiB": _mib("bytes_from_disk"),
    },
    "tokens": {
        "pages": _of("form"),
        "cache": _of("name"),
        "tokens of context": _of("tokens"),
        "same answers": lambda row: f"{row['same_answers']} of {row['answers']}",
        "tokens compared": _of("compared_tokens"),
    },
}
