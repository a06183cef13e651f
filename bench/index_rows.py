"""Rows of the results of the index benchmark: the fastest of them, and how to name them."""

from __future__ import annotations

from typing import Any


def fastest(rows: list[dict], kind: str, threads: int, target: float) -> dict[str, Any] | None:
    """The row with the lowest `kind` ("single" or "batch") latency among those of that recall."""
    measure = "recall" if kind == "single" else "batch_recall"
    good = [row for row in rows if row[measure] >= target]
    return min(good, key=lambda row: row[kind][str(threads)]["median_ms"], default=None)


def label(row: dict[str, Any]) -> str:
    return f"{row['index']} ({setting_text(row)})" if row["setting"] else row["index"]


def setting_text(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{name.removesuffix('_rf')} {value:g}" for name, value in row["setting"].items()
    )


def size_text(data: dict[str, Any]) -> str:
    heads = f"{data['heads']} heads, " if data["heads"] > 1 else ""
    return f"{heads}{data['num_keys']} keys, D = {data['dim']}"
