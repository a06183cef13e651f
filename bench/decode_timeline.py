"""Draw a decode step from a trace: which kernel ran when, on which stream.

python bench/decode.py --contexts 128K --which retrieval --profile /tmp/trace.json.gz
python bench/decode_timeline.py /tmp/trace.json.gz --layer 16 --out docs/assets/decode_step.svg
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

COLOURS = {
    "score": "#4c78a8",
    "rank": "#9ecae9",
    "candidates": "#9ecae9",
    "refine": "#54a24b",
    "sums": "#9ecae9",
    "count": "#88d27a",
    "collect": "#88d27a",
    "pick": "#88d27a",
    "resolve": "#f2cf5b",
    "fetch": "#e45756",
    "value_slope": "#b279a2",
    "estimate": "#f58518",
    "attend": "#72b7b2",
    "merge": "#439894",
}
"""Of wavekv's kernels; what is not among them is the model's."""
MODEL = "#d0d0d0"


def kernels(path: Path) -> list[dict[str, Any]]:
    """The kernels of a chrome trace, by start time."""
    with gzip.open(path) as file:
        events = json.loads(file.read())["traceEvents"]
    found = [event for event in events if event.get("cat") == "kernel"]
    return sorted(found, key=lambda event: event["ts"])


def one_layer(events: list[dict[str, Any]], layer: int) -> list[dict[str, Any]]:
    """From the score of one layer to that of the next: attention, then the rest of the layer."""
    starts = [i for i, event in enumerate(events) if event["name"] == "_score"]
    return events[starts[layer] : starts[layer + 1] + 1]


def draw(events: list[dict[str, Any]], out: Path) -> None:
    """One row a stream, one box a kernel."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    begin = events[0]["ts"]
    streams = sorted({event["args"]["stream"] for event in events})
    main = events[0]["args"]["stream"]
    streams.sort(key=lambda stream: (stream != main, stream))
    figure, axes = plt.subplots(figsize=(11, 0.7 + 0.75 * len(streams)))
    seen: dict[str, Any] = {}
    for event in events[:-1]:
        name = event["name"].removeprefix("_")
        colour = COLOURS.get(name, MODEL)
        row = streams.index(event["args"]["stream"])
        box = axes.barh(
            row, event["dur"], left=event["ts"] - begin, height=0.8, color=colour, linewidth=0
        )
        seen.setdefault(name if name in COLOURS else "the model's own", box)
        if event["dur"] > 9 and name in COLOURS:
            middle = event["ts"] - begin + event["dur"] / 2
            axes.text(middle, row, name, ha="center", va="center", fontsize=7)
    axes.set_yticks(range(len(streams)))
    axes.set_yticklabels(["main stream"] + [f"beside it {i}" for i in range(1, len(streams))])
    axes.invert_yaxis()
    axes.set_xlabel("microseconds from the start of the layer's attention")
    axes.spines[["top", "right"]].set_visible(False)
    names = [name for name in seen if name != "the model's own"] + ["the model's own"]
    figure.legend(
        [seen[name] for name in names if name in seen],
        [name for name in names if name in seen],
        loc="upper center",
        ncol=8,
        fontsize=7,
        frameon=False,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.84))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def main() -> None:
    """Read a trace, draw one layer."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--layer", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("docs/assets/decode_step.svg"))
    arguments = parser.parse_args()
    draw(one_layer(kernels(arguments.trace), arguments.layer), arguments.out)


if __name__ == "__main__":
    main()
