"""How our index compares with faiss at one recall, in figures and as a table."""

from __future__ import annotations

from typing import Any

from index_rows import fastest, label
from index_systems import OURS

ACCEPTED_ON = "post_rope"


def acceptance(data: dict[str, Any], target: float = 0.95) -> dict[str, Any]:
    """How many times as fast as faiss we are at that recall, and to build; one thread."""
    rows = data["methods"]
    peers = [row for row in rows if row["family"] not in OURS and "hnswlib" not in row["family"]]
    build_seconds = {build["index"]: build["seconds"].get("1") for build in data["builds"]}
    ivf = next(build["index"] for build in data["builds"] if build["family"] == "IVF")
    figures: dict[str, Any] = {"recall": target, "threads": 1, "build_baseline": ivf}
    for family in OURS:
        mine = [row for row in rows if row["family"] == family]
        for kind in ("single", "batch"):
            best, other = (fastest(group, kind, 1, target) for group in (mine, peers))
            if best is None or other is None:
                figures[f"{family}: {kind}"] = None
                continue
            best_ms, other_ms = (row[kind]["1"]["median_ms"] for row in (best, other))
            figures[f"{family}: {kind}"] = {
                "ours": label(best),
                "ours_ms": best_ms,
                "faiss": label(other),
                "faiss_ms": other_ms,
                "ratio": other_ms / best_ms,
                "build_seconds": build_seconds[best["index"]],
                "build_ratio": build_seconds[ivf] / build_seconds[best["index"]],
            }
    return figures


def acceptance_lines(record: dict[str, Any]) -> list[str]:
    figures = record["acceptance"]
    if not figures:
        return []
    lines = [
        f"## Against faiss at recall {figures['recall']} on {ACCEPTED_ON}, one thread",
        "",
        "| | ours | ms | fastest of faiss | ms | times as fast | "
        f"build, times as fast as {figures['build_baseline']} |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in figures.items():
        if isinstance(row, dict):
            lines.append(
                f"| {name} | {row['ours']} | {row['ours_ms']:.3f} | {row['faiss']} | "
                f"{row['faiss_ms']:.3f} | {row['ratio']:.2f} | {row['build_ratio']:.2f} |"
            )
        elif row is None:
            lines.append(f"| {name} | not reached | – | – | – | – | – |")
    return [*lines, ""]
