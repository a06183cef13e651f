"""Recall against latency of `WaveIndex`, faiss and hnswlib on keys of attention heads.

    python bench/index.py --out bench/results/index.json --plot docs/assets/index_recall.svg \
        --table docs/index_benchmark.md

Three data sets: keys and queries of the bundled model over 32K tokens (`captured`: every KV head is
an index of its own, figures are means over the heads) and the two generators of `generators.py` at
100K keys (`post_rope`, `out_of_distribution`). Every method is timed in every round, in another
order each time, so that a disturbance of the machine hits all of them; a figure is the median over
the rounds. Needs faiss and hnswlib. About 15 minutes on two CPU cores; `--quick` about two.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Idle OpenMP threads that spin take the core from the others where a machine is shared: with the
# default, two threads can be 30 times as slow as one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import faiss
import numpy as np
from index_acceptance import ACCEPTED_ON, acceptance
from index_heads import DATA_SETS, K, load_data
from index_method import Method, as_row, search_with_work
from index_plot import plot
from index_recall import mass_recall, quality
from index_systems import build_all, candidates, with_setting
from index_table import as_markdown
from index_timing import time_all
from machine import machine_record
from tqdm import tqdm


def run_data(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Build, check and time everything on one data set."""
    heads = load_data(name, options)
    num_keys, dim = heads[0].keys.shape
    builds, methods = [], []
    for candidate in tqdm(candidates(num_keys, dim), desc=f"{name}: build"):
        peers, record = build_all(candidate, heads)
        builds.append(record)
        for setting in candidate.settings[:: 2 if options.quick else 1]:
            chosen = [with_setting(peer, setting) for peer in peers]
            work = [search_with_work(*pair) for pair in zip(chosen, heads, strict=True)]
            found = [np.full_like(done.ids, -1) for done in work]
            methods.append(Method(candidate.family, candidate.name, setting, chosen, work, found))
    time_all(methods, heads, options.rounds)
    return {
        "num_keys": num_keys,
        "dim": dim,
        "heads": len(heads),
        "queries_per_head": len(heads[0].queries),
        "query_sample_per_head": len(heads[0].query_sample),
        "best_mass": float(np.mean([mass_recall(head.true_ids, head) for head in heads])),
        "builds": builds,
        "methods": [as_row(method, quality(method, heads)) for method in methods],
    }


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/index.json"))
    parser.add_argument("--plot", type=Path, default=Path("docs/assets/index_recall.svg"))
    parser.add_argument("--table", type=Path, default=Path("docs/index_benchmark.md"))
    parser.add_argument("--data", nargs="+", choices=DATA_SETS, default=DATA_SETS)
    parser.add_argument("--keys", type=int, help="of the generated sets; default 100000")
    parser.add_argument("--tokens", type=int, help="of the captured set; default 32768")
    parser.add_argument("--rounds", type=int, help="default 3")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="every other setting, one round, 20000 keys, 2 heads at 9216 tokens",
    )
    options = parser.parse_args()
    options.keys = options.keys or (20000 if options.quick else 100000)
    options.tokens = options.tokens or (9216 if options.quick else 32768)
    options.rounds = options.rounds or (1 if options.quick else 3)
    return options


def main() -> None:
    options = parse()
    began, load = time.time(), os.getloadavg()
    data = {name: run_data(name, options) for name in options.data}
    record = {
        "machine": machine_record(),
        "cpu_model": cpu_model(),
        "versions": {"faiss": faiss.__version__, "hnswlib": version("hnswlib")},
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
        "load_average": {"before": load, "after": os.getloadavg()},
        "seconds": round(time.time() - began),
        "out": str(options.out),
        "k": K,
        "rounds": options.rounds,
        "quick": options.quick,
        "data": data,
        "acceptance": acceptance(data[ACCEPTED_ON]) if ACCEPTED_ON in data else None,
    }
    for path in (options.out, options.plot, options.table):
        path.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    plot(record, options.plot)
    options.table.write_text(as_markdown(record, options.plot, options.table))
    print(json.dumps(record["acceptance"], indent=1))


if __name__ == "__main__":
    main()
