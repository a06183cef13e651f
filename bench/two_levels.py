"""How few bytes of index rank and estimate pages: output error against bytes, a prototype.

    python bench/two_levels.py --json bench/results/two_levels.json

Keys, values and queries of the bundled model over texts of 32K tokens (`captured.py`). The index as
it is (*flat*) and variants of one of two levels: 16 pages in a row are a block with a mean key
(8 bits) and a mean value (4 bits); a page keeps the difference of its means to those of the block,
of the key in 2 bits a dimension (or two planes of 2), of the value in 4. Keys have codes in planes
of 2 bits, of the difference to the page's mean as stored. All differences and their queries are
mixed by a Hadamard matrix; a scale is a byte, a step of which is an eighth of an octave.

All pages are scored by the block's mean key and the high plane of theirs. The best `first` budgets
of them are scored again by the high plane of their keys' codes, the best `second` of these by all
bits. What was never scored again is estimated with the mean value of its block.

Error: relative L2 of a head's output to exact attention, mean over texts, layers, heads and steps;
`ratio` to flat. Bytes: of the index, for a page of one KV head of 128 dimensions, sparse reads in
sectors of 32; without the within-page scatter and without log masses, which all variants have.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from captured import Captured, capture
from machine import machine_record
from torch import Tensor

from wavekv.index import balanced_pages, encode_keys
from wavekv.index.codes import decode_keys
from wavekv.index.segments import cut_segments
from wavekv.index.statistics import page_scatter, page_statistics
from wavekv.kernels.means import pack_rows, unpack_rows
from wavekv.kernels.mixing import mixing
from wavekv.kernels.reference import value_slope
from wavekv.kernels.reference_search import rounded_to_int8

PAGE, SEGMENT, BLOCK, SINKS, LATEST, DIM = 8, 8192, 16, 4, 252, 128
SPAN = SEGMENT // PAGE
BUDGETS = (0.005, 0.01, 0.02)
CLIPS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
COARSE_FIRST = 4.0
"""Weight of the error of all bits beside that of the high plane, in the choice of a scale."""


@dataclass(frozen=True)
class Variant:
    """How pages are kept and scored; `refine` budgets of candidates for flat."""

    first: int = 16
    second: int = 0
    codes: tuple[int, ...] = (2, 2)
    """Bits a dimension of each plane of the codes."""
    mean_planes: int = 1
    value_bits: int = 4
    is_flat: bool = False

    def bytes_read(self, budget: float, dim: int = DIM) -> float:
        first, second = self.first * budget, self.second * budget
        if self.is_flat:
            small = 4 + 4 + 4 + 4 + _sectors(first, PAGE) + _sectors(first, 4)
            return dim + dim / 2 + small + first * dim * PAGE / 2
        blocks = (dim + 4 + dim / 2 + 4) / BLOCK
        small = 3 + _sectors(first, 1) + _sectors(first, PAGE) + _sectors(second, PAGE)
        low = first * dim / 4 * (self.mean_planes - 1)
        values = first * dim * self.value_bits / 8
        codes = sum(share * bits for share, bits in zip((first, second), self.codes, strict=False))
        return dim / 4 + blocks + small + low + values + codes * dim * PAGE / 8

    def bytes_stored(self, dim: int = DIM) -> float:
        if self.is_flat:
            return dim + 12 + dim / 2 + 4 + dim * PAGE / 2 + PAGE + 4
        codes = dim * PAGE / 8 * sum(self.codes) + PAGE
        means = dim / 4 * self.mean_planes + 3 + dim * self.value_bits / 8 + 1
        return codes + means + (dim + 4 + dim / 2 + 4) / BLOCK


FLAT = Variant(is_flat=True)
VARIANTS = {
    "flat": FLAT,
    "flat, 8 budgets": Variant(first=8, is_flat=True),
    **{
        f"planes, {first} and {second} budgets": Variant(first, second)
        for first, second in ((16, 4), (12, 4), (12, 3), (8, 3), (6, 3))
    },
    **{
        f"planes of 2 and 1 bits, {first} and {second} budgets": Variant(first, second, (2, 1))
        for first, second in ((20, 5), (16, 4), (12, 4), (12, 3))
    },
    **{
        f"{bits} bits, {first} budgets, values of {value_bits}": Variant(
            first, codes=(bits,), mean_planes=4 - bits, value_bits=value_bits
        )
        for bits, first, value_bits in ((2, 16, 4), (2, 24, 4), (2, 24, 3), (3, 16, 3))
    },
}


def _sectors(share: float, size: int) -> float:
    """Bytes read of an array with `size` bytes a page, where a share of pages is wanted at random:
    whole sectors."""
    return size * (1 - (1 - min(share, 1.0)) ** (32 / size))


class Scores(NamedTuple):
    """[q, N] each."""

    log_mass: Tensor
    shift: Tensor


def planes_of(rows: Tensor, *bits: int) -> list[Tensor]:
    """What the first plane of rows [..., D] stands for, what the first two do, and so on."""
    total = sum(bits)
    levels = 2**total
    largest = rows.abs().amax(-1, keepdim=True).clamp_min(1e-20)
    best: list[Tensor] = []
    least = torch.full_like(largest, torch.inf)
    for clip in CLIPS:
        step = _as_byte(2 * clip * largest / levels)
        code = (rows / step - 0.5).round().clamp(-levels // 2, levels // 2 - 1) + levels // 2
        decoded, error = [], torch.zeros_like(largest)
        for i in range(len(bits)):
            width = 2 ** (total - sum(bits[: i + 1]))
            centre = (code / width).floor() * width + (width - levels) / 2
            decoded.append(centre * step)
            weight = COARSE_FIRST if i else 1.0
            error += weight * (decoded[i] - rows).square().sum(-1, keepdim=True)
        is_better = error < least
        best = [torch.where(is_better, a, b) for a, b in zip(decoded, best or decoded, strict=True)]
        least = torch.minimum(error, least)
    return best


def _as_byte(x: Tensor) -> Tensor:
    return 2 ** ((8 * x.log2()).round() / 8)


class Head:
    """One KV head of one layer: pages, exact masses, and its queries [q = steps * G, D], scaled."""

    def __init__(self, keys: Tensor, values: Tensor, queries: Tensor) -> None:
        """keys, values: [T, D]; queries: [G, Q, D], unscaled."""
        self.group, steps, D = queries.shape
        scaled = queries.transpose(0, 1).reshape(-1, D) * D**-0.5
        self.query, self.steps = scaled, steps
        self.keys, self.values = _pages(keys, values)
        num_pages, self.num_tokens = len(self.keys), len(keys)
        counts = torch.full((1, num_pages), PAGE)
        pages = self.keys[None], self.values[None], counts
        self.raw = page_statistics(*pages)
        spans = [
            page_scatter(*(x[:, a : a + SPAN] for x in pages)) for a in range(0, num_pages, SPAN)
        ]
        # each query is a head of its own for the kernel
        scatter = torch.stack(spans, 1).bfloat16()[:, None]
        self.slope = value_slope(scaled[None], scatter, scale=1.0)[0]
        steady = torch.cat([torch.arange(SINKS), torch.arange(len(keys) - LATEST, len(keys))])
        logits = scaled @ keys[steady].T
        paged = (scaled @ self.keys.flatten(0, 1).T).view(-1, num_pages, PAGE)
        self.top = torch.maximum(logits.amax(1), paged.amax((1, 2)))
        self.weights = (paged - self.top[:, None, None]).exp()
        near = (logits - self.top[:, None]).exp()
        self.near = near @ values[steady], near.sum(1)
        self.exact = self._output(torch.ones(steps, num_pages, dtype=torch.bool), None, None)
        mix = mixing(D).float()
        self.mixed, self.mix = rounded_to_int8(scaled @ mix), mix
        self.stored: dict[object, tuple[Scores, list[Scores], Tensor, Tensor]] = {}

    def error(self, variant: Variant, budget: float) -> Tensor:
        """[q] relative error of the outputs."""
        kind = (variant.is_flat, variant.codes, variant.mean_planes, variant.value_bits)
        if kind not in self.stored:
            self.stored[kind] = self._flat() if variant.is_flat else self._two_levels(variant)
        scores, refined, page_values, block_values = self.stored[kind]
        most = math.ceil(budget * self.num_tokens / PAGE)
        rank, seen = self._rank(scores.log_mass + scores.shift), None
        for budgets, by_codes in zip((variant.first, variant.second), refined, strict=False):
            among = self._each(_best(rank, budgets * most))
            scores = Scores(
                *(torch.where(among, a, b) for a, b in zip(by_codes, scores, strict=True))
            )
            seen = among if seen is None else seen
            rank = self._rank(scores.log_mass)
        chosen = _best(rank, most)
        weights = (scores.log_mass - self.top[:, None]).exp().masked_fill(self._each(chosen), 0.0)
        tail = (weights * seen) @ page_values + (weights * ~seen) @ block_values
        lean = torch.nn.functional.pad(weights * scores.shift, (0, -weights.shape[1] % SPAN))
        tail += torch.einsum("qs,qsd->qd", lean.unflatten(1, (-1, SPAN)).sum(2), self.slope)
        out = self._output(chosen, tail, weights.sum(1))
        return (out - self.exact).norm(dim=1) / self.exact.norm(dim=1)

    def _output(self, chosen: Tensor, tail: Tensor | None, mass: Tensor | None) -> Tensor:
        weights = self.weights * self._each(chosen).unsqueeze(2)
        out = self.near[0] + weights.flatten(1) @ self.values.flatten(0, 1)
        total = self.near[1] + weights.sum((1, 2))
        if tail is not None and mass is not None:
            out, total = out + tail, total + mass
        return out / total[:, None]

    def _flat(self) -> tuple[Scores, list[Scores], Tensor, Tensor]:
        mean, variance = _rounded(self.raw.mean[0], 8), self.raw.variance[0]
        counts = torch.full((1, len(mean)), PAGE)
        residual = decode_keys(encode_keys(self.keys[None], mean[None], counts))[0]
        value = _rounded(self.raw.value_mean[0], 4)
        residual = residual - residual.mean(1, keepdim=True)
        offset = rounded_to_int8(self.query) @ residual.flatten(0, 1).T
        return self._score(mean, variance), [self._by_codes(mean, offset)], value, value

    def _two_levels(self, variant: Variant) -> tuple[Scores, list[Scores], Tensor, Tensor]:
        mean, value = self.raw.mean[0], self.raw.value_mean[0]
        block, block_value = (_block_means(x, n) for x, n in ((mean, 8), (value, 4)))
        planes = planes_of((mean - block) @ self.mix, *[2] * variant.mean_planes)
        means = [block + x @ self.mix.T for x in planes]
        page_value = planes_of((value - block_value) @ self.mix, variant.value_bits)[0]
        rows = (self.keys - means[-1].unsqueeze(1)) @ self.mix
        codes = planes_of(rows, *variant.codes)
        refined = [self._by_codes(means[-1], self.mixed @ plane.flatten(0, 1).T) for plane in codes]
        scores = self._score(means[0], _as_byte(self.raw.variance[0].clamp_min(1e-20)))
        return scores, refined, block_value + page_value @ self.mix.T, block_value

    def _score(self, mean: Tensor, variance: Tensor) -> Scores:
        """By moments (docs/architecture.md)."""
        most = 2 * math.log(PAGE)
        spread = self.query.square().sum(1, keepdim=True) * variance
        frozen = (most * spread).sqrt()
        is_frozen = spread > most
        gain = torch.where(is_frozen, frozen - most / 2, spread / 2)
        log_mass = math.log(PAGE) + self.query @ mean.T + gain
        return Scores(log_mass, torch.where(is_frozen, frozen, spread))

    def _by_codes(self, mean: Tensor, offset: Tensor) -> Scores:
        """offset: [q, N * P], the logit of each key less that of its page's mean."""
        logits = offset.view(len(offset), -1, PAGE) + (self.query @ mean.T).unsqueeze(2)
        log_mass = logits.logsumexp(2)
        from_mean = logits - logits.mean(2, keepdim=True)
        return Scores(log_mass, ((logits - log_mass[..., None]).exp() * from_mean).sum(2))

    def _rank(self, log_mass: Tensor) -> Tensor:
        """[steps, N]"""
        return log_mass.softmax(1).view(self.steps, self.group, -1).sum(1)

    def _each(self, pages: Tensor) -> Tensor:
        """[steps, N] -> [q, N]"""
        return pages.repeat_interleave(self.group, 0)


def _best(rank: Tensor, count: int) -> Tensor:
    """[steps, N] bool"""
    best = rank.topk(min(count, rank.shape[1]), 1).indices
    return torch.zeros_like(rank, dtype=torch.bool).scatter_(1, best, True)


def _block_means(rows: Tensor, bits: int) -> Tensor:
    """[N, D]: of each row, the mean of its block."""
    return _rounded(rows.view(-1, BLOCK, rows.shape[1]).mean(1), bits).repeat_interleave(BLOCK, 0)


def _rounded(rows: Tensor, bits: int) -> Tensor:
    return unpack_rows(*pack_rows(rows, bits), rows.shape[-1], torch.float32)


def _pages(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """[N, P, D] each, of all tokens but sinks and the latest."""
    start, order = SINKS, []
    for length in cut_segments(len(keys) - SINKS - LATEST, segment=SEGMENT, smallest=256):
        order.append(start + balanced_pages(keys[None, start : start + length], PAGE)[0])
        start += length
    index = torch.cat(order)
    return keys[index].unflatten(0, (-1, PAGE)), values[index].unflatten(0, (-1, PAGE))


def measure(texts: list[Captured]) -> list[dict[str, object]]:
    errors: dict[tuple[str, float], list[Tensor]] = defaultdict(list)
    for text in texts:
        for layer in range(len(text.keys)):
            for at in range(text.keys.shape[1]):
                head = Head(*(x[layer, at] for x in (text.keys, text.values, text.queries)))
                for name, variant in VARIANTS.items():
                    for budget in BUDGETS:
                        errors[name, budget].append(head.error(variant, budget))
    return [row_of(name, budget, errors) for budget in BUDGETS for name in VARIANTS]


def row_of(
    name: str, budget: float, errors: dict[tuple[str, float], list[Tensor]]
) -> dict[str, object]:
    ours, flat = (torch.cat(errors[key, budget]) for key in (name, "flat"))
    variant = VARIANTS[name]
    read, stored = variant.bytes_read(budget), variant.bytes_stored()
    return {
        "variant": name,
        "budget": budget,
        "bytes_read": round(read, 1),
        "share_read": round(read / FLAT.bytes_read(budget), 3),
        "bytes_stored": round(stored, 1),
        "share_stored": round(stored / FLAT.bytes_stored(), 3),
        "error": round(ours.mean().item(), 5),
        "ratio": round((ours.mean() / flat.mean()).item(), 3),
        "p95_ratio": round((ours.quantile(0.95) / flat.quantile(0.95)).item(), 3),
        "samples": len(ours),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("bench/results/two_levels.json"))
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101])
    options = parser.parse_args()
    with torch.inference_mode():
        rows = measure([capture(options.tokens, options.questions, s) for s in options.seeds])
    for row in rows:
        print(*row.values(), sep="  ")
    record = {"machine": machine_record(), "context_tokens": options.tokens, "rows": rows}
    options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
