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
