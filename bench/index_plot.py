"""The results of the index benchmark as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from index_rows import size_text
from index_systems import OURS, WAVE, WAVE_SAMPLE

COLOURS = {
    WAVE: "#d62728",
    WAVE_SAMPLE: "#ff7f0e",
    "exact": "#7f7f7f",
    "IVF": "#1f77b4",
    "IVF SQ8": "#17becf",
    "PQ 2 bits + refine": "#2ca02c",
    "PQ 1 bit + refine": "#98df8a",
    "IVF PQ + refine": "#9467bd",
    "IVF PQ residual + refine": "#c5b0d5",
    "RaBitQ 2 bits + refine": "#bcbd22",
    "IVF RaBitQ 2 bits + refine": "#dbdb8d",
    "HNSW (faiss)": "#8c564b",
    "HNSW (hnswlib)": "#e377c2",
}


def plot(record: dict[str, Any], path: Path) -> None:
    """Recall against latency of one query a call, one thread: the front of every family."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "wavekv", "svg.fonttype": "none"})
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator

    sets = record["data"]
    figure, axes = plt.subplots(
        1, len(sets), figsize=(5 * len(sets), 5.2), sharey=True, squeeze=False
    )
    for axis, (name, data) in zip(axes[0], sets.items(), strict=True):
        for family, colour in COLOURS.items():
            points = front([row for row in data["methods"] if row["family"] == family])
            ours = family in OURS
            style = {"linewidth": 2.6 if ours else 1.3, "zorder": 3 if ours else 2}
            axis.plot(*zip(*points, strict=True), "o-", ms=4, color=colour, label=family, **style)
        axis.set(xscale="log", title=f"{name}: {size_text(data)}", ylim=(0.5, 1.005))
        axis.set_xlabel("ms a query (one a call, one thread)")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.grid(True, which="both", alpha=0.25)
    axes[0][0].set_ylabel(f"recall@{record['k']}")
    handles, names = axes[0][0].get_legend_handles_labels()
    columns = 5 if len(sets) > 2 else 2 * len(sets)
    figure.legend(handles, names, loc="lower center", ncols=columns, frameon=False)
    legend_height = 0.05 * (-(-len(COLOURS) // columns))
    figure.tight_layout(rect=(0, legend_height, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def front(rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(ms, recall) of the settings that no faster one of the family beats, by latency."""
    points = sorted((row["single"]["1"]["median_ms"], row["recall"]) for row in rows)
    kept: list[tuple[float, float]] = []
    for ms, found in points:
        if not kept or found > kept[-1][1]:
            kept.append((ms, found))
    return kept
