"""Clustered keys, and queries that move from step to step so that a wanted share of pages recurs.

A page's keys scatter about its centre, centres about those of larger clusters. Queries follow a
stationary autoregressive walk; their scale makes attention as diffuse as in real heads: the best
2 % of pages hold about half of a head's mass.

    python bench/decode_walk.py            checks all of this on sampled data
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor

SUPER_SHARE = PAGE_SHARE = TOKEN_SHARE = 1 / 3
"""Of the variance of a key's component, 1 in all: of cluster centres, page centres and keys."""
PAGES_PER_SUPER = 64
KEY_IN_VALUE = 0.5
"""Of the variance of values: what follows linearly from the key."""
GROUP_CORRELATION = 0.7
BUDGET = 0.02
QUERY_SCALE = 2.4
"""Deviation of a query's component at which the best 2 % of pages of 8 keys hold half the mass."""
CHUNK_ELEMENTS = 1 << 27


def clustered_pages(
    seed: int | torch.Generator,
    heads: int,
    num_pages: int,
    page_size: int,
    dim: int,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """Keys and values [H, N, P, D] of one layer, drawn on the device."""
    generator = _generator(seed, device)
    place = {"device": device, "dtype": dtype}
    keys = torch.empty(heads, num_pages, page_size, dim, **place)
    values = torch.empty_like(keys)
    num_supers = max(1, num_pages // PAGES_PER_SUPER)
    supers = torch.randn(heads, num_supers, dim, generator=generator, **place)
    mixing = torch.randn(heads, dim, dim, generator=generator, **place)
    mixing *= sqrt(KEY_IN_VALUE / dim)
    rows = torch.arange(heads, device=device)[:, None]
    chunk = max(1, CHUNK_ELEMENTS // (heads * page_size * dim))
    for start in range(0, num_pages, chunk):
        some, some_values = keys[:, start : start + chunk], values[:, start : start + chunk]
        shape = some.shape[:2]
        super_ids = torch.randint(num_supers, shape, generator=generator, device=device)
        centres = torch.randn(*shape, dim, generator=generator, **place)
        centres = sqrt(PAGE_SHARE) * centres + sqrt(SUPER_SHARE) * supers[rows, super_ids]
        some.normal_(0, sqrt(TOKEN_SHARE), generator=generator).add_(centres[:, :, None])
        some_values.normal_(0, sqrt(1 - KEY_IN_VALUE), generator=generator)
        some_values.flatten(1, 2).baddbmm_(some.flatten(1, 2), mixing)
    return keys, values


def query_walk(
    pages: Tensor | None,
    steps: int,
    layers: int,
    batch: int,
    query_heads: int,
    kv_heads: int,
    dim: int,
    rho: float,
    seed: int | torch.Generator,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Queries [steps, layers, B, Hq, D], before the division of logits by sqrt(D).

    `rho` is the correlation of a query with that of the step before. Query heads of a KV head share
    a part of theirs. The scale is the one that fits `pages` (centres [H, N, D], or keys
    [H, N, P, D]), else `QUERY_SCALE`; the device that of `pages` unless given.
    """
    if device is None:
        device = "cpu" if pages is None else pages.device
    generator = _generator(seed, device)
    scale = QUERY_SCALE if pages is None else query_scale(pages)
    shape = (layers, batch, kv_heads, query_heads // kv_heads, dim)
    walk = torch.empty(steps, layers, batch, query_heads, dim, dtype=dtype, device=device)
    state = _grouped(shape, generator)
    for step in range(steps):
        if step:
            state = rho * state + sqrt(1 - rho**2) * _grouped(shape, generator)
        walk[step] = scale * state.flatten(2, 3)
    return walk


def query_scale(pages: Tensor, budget: float = BUDGET, mass: float = 0.5, seed: int = 0) -> float:
    """Deviation of a query's component at which the best pages of the budget hold that mass."""
    some = pages[:2].float()  # two heads say enough
    some = some if some.dim() == 4 else some[:, :, None]
    generator = _generator(seed, some.device)
    queries = torch.randn(len(some), 16, some.shape[-1], generator=generator, device=some.device)
    logits = _logits(queries, some)
    count = num_best(some.shape[1], budget)

    def held(scale: float) -> float:
        masses = (scale * logits).logsumexp(-1).softmax(-1)
        return masses.topk(count).values.sum(-1).mean().item()

    return _bisect(held, mass, 0.0, 32.0)


def rho_for_reuse(
    reuse: float,
    budget: float = BUDGET,
    *,
    num_pages: int = 8192,
    page_size: int = 8,
    dim: int = 128,
    group: int = 4,
    draws: int = 32,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> float:
    """The `rho` at which a step's best pages are so far those of the step before.

    The best pages of a KV head are those with the largest sum, over its query heads, of mass; as
    many as the budget. Solved on pages and pairs of queries of its own, at `QUERY_SCALE`.
    """
    generator = _generator(seed, device)
    keys, _ = clustered_pages(generator, 2, num_pages, page_size, dim, device, torch.float32)
    first, noise = (
        _logits(_grouped((2, draws, group, dim), generator).flatten(1, 2), keys) for _ in range(2)
    )
    count = num_best(num_pages, budget)
    before = best_pages(QUERY_SCALE * first, group, count)

    def shared(rho: float) -> float:
        after = QUERY_SCALE * (rho * first + sqrt(1 - rho**2) * noise)
        return share_of(best_pages(after, group, count), before, num_pages)

    return _bisect(shared, reuse, 0.0, 1.0)


def best_pages(logits: Tensor, group: int, count: int) -> Tensor:
    """Ids [H, S, count] by the mass of pages, summed over query heads. logits [H, S * G, N, P]."""
    masses = logits.logsumexp(-1).softmax(-1)
    return masses.unflatten(1, (-1, group)).sum(2).topk(count).indices


def share_of(ids: Tensor, others: Tensor, num_pages: int) -> float:
    """The share of ids [..., count] that is among the others [..., count]."""
    found = torch.zeros(*others.shape[:-1], num_pages, dtype=torch.bool, device=others.device)
    return found.scatter_(-1, others, True).gather(-1, ids).float().mean().item()


def num_best(num_pages: int, budget: float) -> int:
    """Pages of a budget, one at least."""
    return max(1, round(budget * num_pages))


def _logits(queries: Tensor, keys: Tensor) -> Tensor:
    """[H, Q, N, P] of queries [H, Q, D] and keys [H, N, P, D]."""
    products = queries @ keys.flatten(1, 2).transpose(1, 2)
    return (products * keys.shape[-1] ** -0.5).unflatten(-1, keys.shape[1:3])


def _grouped(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal draws [..., G, D] of deviation 1, correlated within a group."""
    place = {"generator": generator, "device": generator.device}
    common = torch.randn(*shape[:-2], 1, shape[-1], **place)
    own = torch.randn(shape, **place)
    return sqrt(GROUP_CORRELATION) * common + sqrt(1 - GROUP_CORRELATION) * own


def _bisect(rising: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Where a rising function meets the target, to 1 part in 2^20 of the range."""
    for _ in range(20):
        middle = (low + high) / 2
        if rising(middle) < target:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _generator(seed: int | torch.Generator, device: torch.device | str) -> torch.Generator:
    if isinstance(seed, torch.Generator):
        return seed
    return torch.Generator(device).manual_seed(seed)


def check(options: argparse.Namespace) -> None:
    """Print what sampled pages and walks are like; an error where they are not as promised."""
    heads, group, steps, batch, dim = 2, 4, 4, 16, options.dim
    keys, values = clustered_pages(
        1, heads, options.pages, options.page_size, dim, options.device, torch.float32
    )
    within = keys.var(2, unbiased=True).mean() / keys.var((1, 2)).mean()
    flat, flat_values = keys.flatten(1, 2)[:, :20000], values.flatten(1, 2)[:, :20000]
    residual = flat_values - flat @ torch.linalg.lstsq(flat, flat_values).solution
    explained = 1 - residual.var() / flat_values.var()
    print(f"scatter within pages {within:.3f}, of values by keys {explained:.3f}")
    print(f"scale of queries {query_scale(keys):.3f}, by centres {query_scale(keys.mean(2)):.3f}")
    assert abs(within - TOKEN_SHARE) < 0.02
    assert abs(explained - KEY_IN_VALUE) < 0.02
    count = num_best(options.pages, BUDGET)
    for reuse in (0.5, 0.8, 0.9, 0.95):
        rho = rho_for_reuse(
            reuse, page_size=options.page_size, dim=dim, group=group, device=options.device
        )
        walk = query_walk(
            None, steps, 1, batch, heads * group, heads, dim, rho, 2, device=options.device
        )
        # [steps, B, Hq, D] -> [H, steps * B * G, D]
        queries = walk[:, 0].unflatten(2, (heads, group)).movedim(2, 0).flatten(1, 3)
        logits = _logits(queries, keys)
        ids = best_pages(logits, group, count)
        masses = logits.logsumexp(-1).softmax(-1)
        own = masses.topk(count).values.sum(-1).mean().item()
        of_group = masses.gather(-1, ids.repeat_interleave(group, 1)).sum(-1).mean().item()
        by_step = ids.unflatten(1, (steps, batch))
        found = share_of(by_step[:, 1:], by_step[:, :-1], options.pages)
        print(
            f"reuse {reuse}: rho {rho:.4f}, found {found:.3f}; the best {BUDGET:.0%} of pages "
            f"hold {own:.3f} of a head's mass, {of_group:.3f} where chosen for its group"
        )
        assert abs(found - reuse) < 0.03
        assert abs(own - 0.5) < 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages", type=int, default=16384)
    parser.add_argument("--page-size", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    check(parser.parse_args())


if __name__ == "__main__":
    main()
