"""The torch reference against loops over plain numbers, on tiny sizes."""

import math

import pytest
import torch
from torch import Tensor

from wavekv.kernels import reference

B, HKV, G, D, N, P = 2, 2, 3, 4, 5, 3
HEADS = [(b, h, g) for b in range(B) for h in range(HKV) for g in range(G)]


def dot(a: Tensor, b: Tensor) -> float:
    return math.fsum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def bend(logit: float, softcap: float | None) -> float:
    return logit if softcap is None else softcap * math.tanh(logit / softcap)


def softmax_state(logits: list[float], values: list[Tensor]) -> tuple[list[float], float]:
    mass = math.fsum(math.exp(x) for x in logits)
    if mass == 0:
        return [0.0] * D, -math.inf
    rows = [
        [math.exp(x) / mass * v for v in row.tolist()]
        for x, row in zip(logits, values, strict=True)
    ]
    return [math.fsum(column) for column in zip(*rows, strict=True)], math.log(mass)


def assert_state(state: tuple[Tensor, Tensor], b: int, head: int, expected) -> None:
    torch.testing.assert_close(state[0][b, head], torch.tensor(expected[0]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state[1][b, head], torch.tensor(expected[1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("moments", [1, 2])
def test_score(softcap: float | None, moments: int) -> None:
    query, mean = torch.randn(B, HKV * G, D), torch.randn(B, HKV, N, D)
    variance = 3 * torch.rand(B, HKV, N)
    counts = torch.randint(0, 5, (B, HKV, N), dtype=torch.int32)
    spread = variance if moments == 2 else None
    log_mass, shift = reference.score(query, mean, spread, counts, scale=0.7, softcap=softcap)
    for b, h, g in HEADS:
        for n in range(N):
            count = int(counts[b, h, n])
            actual = float(log_mass[b, h * G + g, n])
            if count == 0:
                assert actual == -math.inf
                assert shift[b, h * G + g, n] == 0
                continue
            raw = 0.7 * dot(query[b, h * G + g], mean[b, h, n])
            q = query[b, h * G + g]
            s2 = 0.49 * dot(q, q) * float(variance[b, h, n]) * (moments == 2)
            rise = s2
            if softcap is not None:
                bend_slope = 1 - math.tanh(raw / softcap) ** 2
                rise, s2 = bend_slope * s2, bend_slope**2 * s2
            log_n = math.log(count)
            correction = s2 / 2 if s2 <= 2 * log_n else math.sqrt(2 * log_n * s2) - log_n
            expected = log_n + bend(raw, softcap) + correction
            assert actual == pytest.approx(expected, rel=1e-5, abs=1e-5)
            rise *= 1 if s2 <= 2 * log_n else math.sqrt(2 * log_n / s2)
            assert shift[b, h * G + g, n] == pytest.approx(rise, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("top_p", [None, 0.4, 0.9])
@pytest.mark.parametrize("max_pages", [0, 2, 4, 9])
def test_select(top_p: float | None, max_pages: int) -> None:
    masses = 2 * torch.randn(B, HKV * G, N)
    masses[..., 1] = -torch.inf
    masses[0, 0] = -torch.inf
    chosen = reference.select(masses, HKV, max_pages=max_pages, min_pages=0, top_p=top_p)
    for b in range(B):
        for h in range(HKV):
            rank = [0.0] * N
            for row in masses[b, h * G : h * G + G].tolist():
                mass = math.fsum(math.exp(x) for x in row)
                for n in range(N):
                    rank[n] += math.exp(row[n]) / mass if mass else 0.0
            best = sorted((n for n in range(N) if n != 1), key=lambda n: -rank[n])[:max_pages]
            taken: list[int] = []
            for n in best:
                if top_p is None or sum(rank[i] for i in taken) < top_p * sum(rank):
                    taken.append(n)
            padding = [-1] * (min(max_pages, N) - len(taken))
            assert chosen[b, h].tolist() == sorted(taken) + padding


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attend_pages(softcap: float | None) -> None:
    query = torch.randn(B, HKV * G, D)
    chunks = [torch.randn(4, 2, P, D) for _ in range(3)]
    page_ids = torch.randint(-1, 12, (B, HKV, N))
    counts = torch.randint(0, P + 1, (B, HKV, N), dtype=torch.int32)
    state = reference.attend_pages(query, chunks, page_ids, counts, scale=0.7, softcap=softcap)
    for b, h, g in HEADS:
        logits, values = [], []
        for page, count in zip(page_ids[b, h].tolist(), counts[b, h].tolist(), strict=True):
            if page >= 0:
                keys, vals = chunks[page // 4][page % 4]
                for t in range(count):
                    logits.append(bend(0.7 * dot(query[b, h * G + g], keys[t]), softcap))
                    values.append(vals[t])
        assert_state(state, b, h * G + g, softmax_state(logits, values))


def test_attend_dense() -> None:
    query = torch.randn(B, HKV * G, D)
    keys, values = torch.randn(2, B, HKV, N, D)
    valid = torch.rand(B, N) < 0.6
    valid[1] = False
    state = reference.attend_dense(query, keys, values, valid, scale=0.7)
    for b, h, g in HEADS:
        live = [s for s in range(N) if valid[b, s]]
        logits = [0.7 * dot(query[b, h * G + g], keys[b, h, s]) for s in live]
        expected = softmax_state(logits, [values[b, h, s] for s in live])
        assert_state(state, b, h * G + g, expected)


@pytest.mark.parametrize("span_pages", [None, 1, 2, 7])
def test_estimate(span_pages: int | None) -> None:
    masses, value_mean = torch.randn(B, HKV * G, N), torch.randn(B, HKV, N, D)
    selected = torch.tensor([[[3, 0, -1], [-1, -1, -1]], [[0, 1, 2], [4, 3, 2]]])
    shift = slope = None
    if span_pages is not None:
        shift, slope = torch.randn(masses.shape), torch.randn(B, HKV * G, -(-N // span_pages), D)
    state = reference.estimate(
        masses, value_mean, selected, shift, slope, span_pages=span_pages or 1
    )
    for b, h, g in HEADS:
        head, values = h * G + g, list(value_mean[b, h])
        if shift is not None and slope is not None:
            leans = [shift[b, head, n] * slope[b, head, n // span_pages] for n in range(N)]
            values = [value + lean for value, lean in zip(values, leans, strict=True)]
        left = [n for n in range(N) if n not in selected[b, h].tolist()]
        logits = [float(masses[b, head, n]) for n in left]
        assert_state(state, b, head, softmax_state(logits, [values[n] for n in left]))


def test_merge_state() -> None:
    keys = torch.randn(1, 1, 7, D)
    values, query = torch.randn(1, 1, 7, D), torch.randn(1, 1, D)
    cut = [
        reference.attend_dense(query, keys[:, :, part], values[:, :, part], None, scale=1.0)
        for part in (slice(0, 3), slice(3, 7))
    ]
    state = reference.merge_state(*cut[0], *cut[1])
    logits = [dot(query[0, 0], keys[0, 0, s]) for s in range(7)]
    assert_state(state, 0, 0, softmax_state(logits, list(values[0, 0])))
