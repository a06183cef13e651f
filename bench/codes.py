"""How well codes rank keys: the true top 100 among the best 200 by codes, and the codes' bytes.

    python bench/codes.py --out bench/results/codes.json

Keys and queries of the bundled model over 32K tokens (`captured.py`), every KV head an index of its
own; half of the questions are the query sample, the other half ask. All pages but the last in rank
are scanned, so that only the codes decide which 200 keys are compared exactly.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

import numpy as np
from captured import Captured, capture
from machine import machine_record
from tqdm import tqdm

from wavekv.cli.answering import VALUE_DIGITS
from wavekv.index import IndexParams, WaveIndex, exact_search, recall_at_k

K, CANDIDATES = 100, 200


def measure(text: Captured, params: IndexParams, sampled: bool) -> dict[str, float]:
    """Recall, and bytes as a share of the keys' in bfloat16, over all heads."""
    recalls, shares, dims = [], [], []
    half = text.queries.shape[3] // 2 // VALUE_DIGITS * VALUE_DIGITS
    for keys, queries in zip(text.keys.flatten(0, 1), text.queries.flatten(0, 1), strict=True):
        # [G, Q, D]: whole questions, first half and second
        sample, asked = (
            part.reshape(-1, keys.shape[1]).numpy() for part in queries.split([half, half], 1)
        )
        keys = keys.numpy()
        index = WaveIndex.build(keys, params, query_sample=sample if sampled else None)
        budget = index.stats()["num_pages"] * params.page_size - params.page_size
        found = index.search(asked, K, budget=budget, rerank=CANDIDATES / K)
        recalls.append(float(recall_at_k(found.ids, exact_search(keys, asked, K).ids).mean()))
        shares.append(index.code_nbytes / (2 * keys.size))
        dims.append(index.stats()["code_dims"])
    return {
        "recall": round(mean(recalls), 5),
        "recall_of_worst_head": round(min(recalls), 5),
        "code_bytes_of_bfloat16_keys": round(mean(shares), 5),
        "code_dims": float(np.mean(dims)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/codes.json"))
    parser.add_argument("--seed", type=int, default=100)
    args = parser.parse_args()
    text = capture(seed=args.seed)
    dim = text.keys.shape[-1]
    settings = [
        (page_size, code_dims, sampled)
        for page_size in (8, 16)
        for code_dims, sampled in ((None, False), (None, True), (dim // 2, True))
    ]
    rows = []
    for page_size, code_dims, sampled in tqdm(settings, desc="settings"):
        params = IndexParams(page_size=page_size, code_dims=code_dims)
        row = {"page_size": page_size, "query_sample": sampled, "asked_code_dims": code_dims}
        rows.append(row | measure(text, params, sampled))
        print(json.dumps(rows[-1]), flush=True)
    record = {"machine": machine_record(), "rows": rows}
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
