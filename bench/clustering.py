"""Tail error and build time of clusterings of captured keys, beside spherical k-means.

    python bench/clustering.py --out bench/results/clustering.json

Keys, values and queries of the bundled model over texts of 32K tokens (`captured.py`), a seed each.
Tail error: exact attention over the clusters ranked first until the budget of tokens is reached,
the second-moment estimate over the others; relative L2 error of each query head's output, mean and
95th percentile over seeds, layers, heads and queries. `slope`: with leaning values, one span a
segment. `within`: sum of squares of the keys to their cluster's mean, a token. Build time: the
fastest of `--repeats` over all rows, in milliseconds for 1000 keys of one head.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from captured import capture
from machine import machine_record
from torch import Tensor

from wavekv.index import balanced_pages
from wavekv.kernels import reference

SEGMENT = 8192
MEAN_SIZE = 16
ITERATIONS = 10
Clustering = Callable[[Tensor], Tensor]


def kmeans(rows: Tensor, num_clusters: int, *, spherical: bool, centre: bool) -> Tensor:
    """[R, S] int64 cluster of each token of rows [R, S, D]; starts from evenly spaced tokens."""
    labels = []
    for x in rows.split(2):
        b, S, D = x.shape
        if centre:
            x = x - x.mean(1, keepdim=True)
        if spherical:
            x = torch.nn.functional.normalize(x, dim=-1)
        centroids = x[:, :: S // num_clusters]
        flat = x.reshape(-1, D)
        offset = num_clusters * torch.arange(b).unsqueeze(1)
        for i in range(ITERATIONS):
            bias = -0.5 * centroids.square().sum(-1) * (not spherical)
            nearest = torch.baddbmm(bias.unsqueeze(1), x, centroids.mT).max(2).indices
            if i < ITERATIONS - 1:
                index = (nearest + offset).view(-1)
                count = torch.bincount(index, minlength=b * num_clusters).unsqueeze(1)
                total = torch.zeros(b * num_clusters, D).index_add_(0, index, flat)
                if spherical:
                    new = torch.nn.functional.normalize(total, dim=-1)
                else:
                    new = total / count.clamp_min(1)
                centroids = torch.where(count > 0, new, centroids.reshape(-1, D)).view(b, -1, D)
        labels.append(nearest)
    return torch.cat(labels)


def pages(rows: Tensor, page_size: int, *, refine: bool) -> Tensor:
    """[R, S] int64 page of each token."""
    order = balanced_pages(rows, page_size, refine=refine)
    return torch.empty_like(order).scatter_(
        1, order, (torch.arange(order.shape[1]) // page_size).expand_as(order)
    )


class Statistics:
    """Of C clusters a segment, shaped for the reference kernels: [L, 1, H, N, ...]."""

    def __init__(self, keys: Tensor, values: Tensor, labels: Tensor, C: int) -> None:
        L, H, T, D = keys.shape
        R = labels.shape[0]
        flat = (labels + C * torch.arange(R).unsqueeze(1)).view(-1)
        count = torch.bincount(flat, minlength=R * C)

        def mean(x: Tensor) -> Tensor:
            total = torch.zeros(R * C, D).index_add_(0, flat, x.reshape(-1, D))
            return total / count.clamp_min(1).unsqueeze(1)

        def by_layer(x: Tensor) -> Tensor:
            return x.reshape(L, 1, H, -1, *x.shape[1:])

        key_mean, value_mean = mean(keys), mean(values)
        k = keys.reshape(-1, D) - key_mean[flat]
        v = values.reshape(-1, D) - value_mean[flat]
        self.within = k.square().sum(1).mean().item()
        self.within_values = v.square().sum(1).mean().item()
        self.count, self.mean = by_layer(count), by_layer(key_mean)
        self.variance = by_layer(mean(k.square()).mean(-1))
        self.value_mean = by_layer(value_mean)
        k, v = k.view(R, -1, D), v.view(R, -1, D)
        self.scatter = by_layer(torch.stack([k.mT @ k, v.mT @ k], dim=1)).bfloat16()
        # [L, H, T] cluster among all of the head
        starts = C * torch.arange(T // labels.shape[1]).unsqueeze(1)
        self.labels = (labels.view(L, H, -1, labels.shape[1]) + starts).view(L, H, T)


def exact(keys: Tensor, values: Tensor, queries: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of queries [Q, H, G, D] over the live [Q, H, T] tokens; [Q, Hq, D], [Q, Hq]."""
    logits = queries @ keys.mT * queries.shape[-1] ** -0.5
    logits = logits.masked_fill(~live.unsqueeze(2), -torch.inf)
    return (logits.softmax(-1) @ values).flatten(1, 2), logits.logsumexp(-1).flatten(1, 2)


def errors(
    keys: Tensor, values: Tensor, queries: Tensor, labels: Tensor, C: int, budget: float
) -> dict[str, float]:
    """Tail errors of a clustering, labels [R, SEGMENT] in 0..C-1, and how tight it is."""
    stats = Statistics(keys, values, labels, C)
    L, H, T, D = keys.shape
    N = T // SEGMENT * C
    scale = D**-0.5
    found: dict[str, list[Tensor]] = {"mean": [], "slope": []}
    for layer in range(L):
        # a few queries at a time bound the memory
        for q in queries[layer].permute(2, 0, 1, 3).split(20):
            Q, _, G, _ = q.shape
            flat = q.flatten(1, 2)
            log_mass, shift = reference.score(
                flat, stats.mean[layer], stats.variance[layer], stats.count[layer], scale=scale
            )
            rank = log_mass.view(Q, H, G, N).softmax(-1).sum(2)
            order = rank.sort(dim=-1, descending=True, stable=True).indices
            count = stats.count[layer].expand(Q, H, N).gather(2, order)
            wanted = count.cumsum(-1) - count < budget * T
            selected = torch.where(wanted, order, -1)
            taken = torch.zeros(Q, H, N, dtype=torch.bool).scatter_(2, order, wanted)
            near = exact(
                keys[layer], values[layer], q, taken.gather(2, stats.labels[layer].expand(Q, H, T))
            )
            full, _ = exact(keys[layer], values[layer], q, torch.ones(1, 1, T, dtype=torch.bool))
            value_mean = stats.value_mean[layer].expand(Q, H, N, D)
            scatter = stats.scatter[layer]
            slope = reference.value_slope(flat, scatter.expand(Q, *scatter.shape[1:]), scale=scale)
            far = reference.estimate(log_mass, value_mean, selected)
            lean = reference.estimate(log_mass, value_mean, selected, shift, slope, span_pages=C)
            for name, estimate in (("mean", far), ("slope", lean)):
                out, _ = reference.merge_state(*near, *estimate)
                found[name].append((out - full).norm(dim=-1) / full.norm(dim=-1))
    row = {}
    for name, prefix in (("mean", "error"), ("slope", "error_slope")):
        error = torch.cat(found[name])
        row[prefix] = error.mean().item()
        row[f"{prefix}_p95"] = error.quantile(0.95).item()
        row[f"{prefix}_median"] = error.median().item()
    row["within"], row["within_values"] = stats.within, stats.within_values
    return row


def methods() -> Iterator[tuple[str, int, Clustering]]:
    """Name, page size and clustering of rows [R, SEGMENT, D]."""

    def k_means(spherical: bool, centre: bool) -> Clustering:
        return lambda x: kmeans(x, SEGMENT // MEAN_SIZE, spherical=spherical, centre=centre)

    def balanced(page_size: int, refine: bool) -> Clustering:
        return lambda x: pages(x, page_size, refine=refine)

    yield "spherical k-means, centred", MEAN_SIZE, k_means(True, True)
    yield "spherical k-means", MEAN_SIZE, k_means(True, False)
    yield "k-means", MEAN_SIZE, k_means(False, False)
    for page_size in (16, 8):
        yield "bisection", page_size, balanced(page_size, False)
        yield "bisection, refined", page_size, balanced(page_size, True)


def run(
    keys: Tensor, values: Tensor, queries: Tensor, *, budget: float, repeats: int
) -> Iterator[tuple[str, int, dict[str, float]]]:
    """Name, page size and numbers of each method."""
    rows = keys.reshape(-1, SEGMENT, keys.shape[-1])
    chosen = list(methods())
    build = dict.fromkeys(range(len(chosen)), float("inf"))
    labels = {}
    # in turn, so that a busy moment of the machine does not hit one method alone
    for _ in range(repeats):
        for i, (_, _, cluster) in enumerate(chosen):
            start = time.perf_counter()
            labels[i] = cluster(rows)
            build[i] = min(build[i], time.perf_counter() - start)
    for i, (name, size, _) in enumerate(chosen):
        row = errors(keys, values, queries, labels[i], SEGMENT // size, budget)
        milliseconds = build[i] * 1e6 / rows.shape[:2].numel()
        numbers = row | {"build_ms_per_1000": milliseconds}
        yield name, size, {key: round(value, 5) for key, value in numbers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/clustering.json"))
    parser.add_argument("--budget", type=float, default=0.02)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: dict[tuple[str, int], list[dict[str, float]]] = {}
    for seed in args.seeds:
        text = capture(seed=seed)
        torch.set_num_threads(args.threads)
        found = run(text.keys, text.values, text.queries, budget=args.budget, repeats=args.repeats)
        for name, size, row in found:
            print(json.dumps({"seed": seed, "method": name, "page_size": size} | row), flush=True)
            rows.setdefault((name, size), []).append(row)
    record = {
        "machine": machine_record(),
        "arguments": {**vars(args), "out": str(args.out)},
        "rows": [
            {"method": name, "page_size": size, "mean": mean_of(row), "by_seed": row}
            for (name, size), row in rows.items()
        ],
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")


def mean_of(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each number over rows."""
    return {name: round(sum(row[name] for row in rows) / len(rows), 5) for name in rows[0]}


if __name__ == "__main__":
    main()
