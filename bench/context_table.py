"""The tables of the benchmark of saved contexts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def lines(record: dict[str, Any]) -> Iterator[str]:
    """What a record says, a table a part."""
    for part, write in TABLES.items():
        if part in record:
            yield ""
            for row in write(record[part]["rows"]):
                yield "| " + " | ".join(row) + " |"


def _pages(rows: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    yield "page", "files", "state", "batch", "ours, ms", "plain pool, ms", "plain / ours"
    yield ("---",) * 7
    for row in rows:
        yield (
            str(row["page_bytes"]),
            row["files"],
            row["state"],
            str(row["batch"]),
            f"{row['ours_ms']:.2f}",
            f"{row['plain_ms']:.2f}",
            f"{row['ratio']:.2f}",
        )


TABLES = {"pages": _pages}
