"""The results of the index benchmark as a page of markdown."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from index_acceptance import acceptance_lines
from index_rows import fastest, setting_text, size_text
from index_threads import CORES, THREADS

TARGETS = (0.80, 0.90, 0.95, 0.99)


def as_markdown(record: dict[str, Any], plot_path: Path, table_path: Path) -> str:
    image = os.path.relpath(plot_path, table_path.parent)
    lines = [
        "# Index benchmark",
        "",
        f"Finding the {record['k']} keys of largest inner product. *captured*: keys and queries of "
        "the bundled model, one index for each KV head, figures are means over the heads. "
        "*post_rope* and *out_of_distribution*: generated keys and queries (`bench/generators.py`)."
        " A cell is the lowest latency at which a setting reaches that recall, in ms a query, and "
        "the setting; a latency is the median over queries, then over rounds "
        f"({record['rounds']}). OpenMP threads wait without spinning (`OMP_WAIT_POLICY`). "
        "*k_factor* and *rerank* multiply the number of candidates that get exact scores; *budget* "
        "is the share of keys whose codes are read. Bytes hold the keys too.",
        "",
        f"![Recall against latency]({image})",
        "",
    ]
    for name, data in record["data"].items():
        lines += [
            f"## {name}: {size_text(data)}",
            "",
            f"{data['queries_per_head']} queries a head, {data['query_sample_per_head']} others as "
            f"query sample. The best {record['k']} keys hold {data['best_mass']:.1%} of the "
            "softmax mass.",
            "",
        ]
        for kind, threads in (("single", 1), ("batch", CORES)):
            lines += [*table_lines(data, kind, threads), ""]
    lines += acceptance_lines(record)
    lines.append(
        f"Made by `{record['machine']['command']}` ({record['machine']['cpu']}, "
        f"{record['cpu_model']}, faiss {record['versions']['faiss']}, commit "
        f"{record['machine']['commit']}); raw numbers in `{record['out']}`."
    )
    return "\n".join(lines) + "\n"


def table_lines(data: dict[str, Any], kind: str, threads: int) -> list[str]:
    """One row for each index, one column for each recall."""
    what = "One query a call" if kind == "single" else "All queries in a call"
    lines = [
        f"{what}, {threads} thread{'s' * (threads > 1)}:",
        "",
        "| index | "
        + " | ".join(f"recall ≥ {target:.2f}" for target in TARGETS)
        + " | "
        + " | ".join(f"build, {n} thread{'s' * (n > 1)}" for n in THREADS)
        + " | MB |",
        "|---" * (2 + len(TARGETS) + len(THREADS)) + "|",
    ]
    for build in data["builds"]:
        rows = [row for row in data["methods"] if row["index"] == build["index"]]
        cells = [
            cell_text(fastest(rows, kind, threads, target), kind, threads) for target in TARGETS
        ]
        seconds = [build["seconds"].get(str(n)) for n in THREADS]
        cells += ["not run" if value is None else f"{value:.2f} s" for value in seconds]
        lines.append(f"| {build['index']} | {' | '.join(cells)} | {build['nbytes'] / 1e6:.1f} |")
    return lines


def cell_text(row: dict[str, Any] | None, kind: str, threads: int) -> str:
    if row is None:
        return "–"
    ms = f"{row[kind][str(threads)]['median_ms']:.3f}"
    return f"{ms} ({setting_text(row)})" if row["setting"] else ms
