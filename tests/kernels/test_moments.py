"""The mass and shift of a page by its moments: against plain numbers, and laws. That the kernels
follow it is tested in `test_kernel_levels`."""

import math

import pytest
import torch
from torch import Tensor

from wavekv.kernels.reference import by_group, by_moments

B, HKV, G, D, N = 2, 2, 3, 4, 5


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def score(
    query: Tensor,
    mean: Tensor,
    variance: Tensor | None,
    counts: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Of queries [B, Hq, D] and pages with mean keys [B, Hkv, N, D] of this variance."""
    q = by_group(query, mean.shape[1]) * scale
    return by_moments(q @ mean.mT, q.square().sum(-1), variance, counts, softcap)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("has_variance", [False, True])
def test_by_moments(softcap: float | None, has_variance: bool) -> None:
    query, mean = torch.randn(B, HKV * G, D), torch.randn(B, HKV, N, D)
    variance = 3 * torch.rand(B, HKV, N)
    counts = torch.randint(0, 5, (B, HKV, N), dtype=torch.int32)
    given = variance if has_variance else None
    log_mass, shift = score(query, mean, given, counts, scale=0.7, softcap=softcap)
    for b, head, n in ((b, head, n) for b in range(B) for head in range(HKV * G) for n in range(N)):
        h, q = head // G, query[b, head].tolist()
        count = int(counts[b, h, n])
        if count == 0:
            assert log_mass[b, head, n] == -math.inf
            assert shift[b, head, n] == 0
            continue
        x = 0.7 * dot(q, mean[b, h, n].tolist())
        s2 = rise = 0.49 * dot(q, q) * float(variance[b, h, n]) * has_variance
        if softcap is not None:
            slope = 1 - math.tanh(x / softcap) ** 2
            x = softcap * math.tanh(x / softcap)
            rise, s2 = slope * s2, slope**2 * s2
        log_n = math.log(count)
        correction = s2 / 2 if s2 <= 2 * log_n else math.sqrt(2 * log_n * s2) - log_n
        rise *= 1 if s2 <= 2 * log_n else math.sqrt(2 * log_n / s2)
        expected = log_n + x + correction
        assert float(log_mass[b, head, n]) == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert float(shift[b, head, n]) == pytest.approx(rise, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("softcap", [3.0, 20.0])
def test_shift_under_a_soft_cap_is_close_to_that_of_the_keys(softcap: float) -> None:
    """Of the logits before the cap, weighted by the mass after it."""
    query = torch.randn(1, 4, 64)
    keys = 0.6 * torch.randn(1, 1, 200, 32, 64) + 0.5 * torch.randn(1, 1, 200, 1, 64)
    counts = torch.full((1, 1, 200), 32, dtype=torch.int32)
    logits = torch.einsum("bhd,bznpd->bhnp", query, keys) / 8
    weights = (softcap * torch.tanh(logits / softcap)).softmax(-1)
    truth = ((weights - 1 / 32) * logits).sum(-1)
    variance = keys.var(3, correction=0).mean(-1)
    shift = score(query, keys.mean(3), variance, counts, scale=1 / 8, softcap=softcap)[1]
    assert (shift - truth).abs().mean() < 0.3 * truth.abs().mean()


@pytest.mark.parametrize("spread", [0.3, 4.0])
def test_shift_is_how_the_mass_grows_along_the_query(spread: float) -> None:
    """The mean logit of a page, weighted by mass, is the derivative of its log mass by the scale of
    the query; less the logit of the mean key it is the shift. Both sides of the freezing."""
    query, mean = torch.randn(1, 4, 16), torch.randn(1, 1, 4, 16)
    variance = spread * torch.rand(1, 1, 4)
    counts = torch.full((1, 1, 4), 8, dtype=torch.int32)
    step = 1e-2
    less, more = (score(query, mean, variance, counts, scale=1 + x)[0] for x in (-step, step))
    shift = score(query, mean, variance, counts, scale=1.0)[1]
    logit = query @ mean[0].mT
    torch.testing.assert_close((more - less) / (2 * step) - logit, shift, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_score_of_single_tokens_is_their_logit(softcap: float | None) -> None:
    query, mean = torch.randn(1, 2, 8), torch.randn(1, 1, 5, 8)
    counts = torch.ones(1, 1, 5, dtype=torch.int32)
    logits = query @ mean[0].mT
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_mass, shift = score(query, mean, torch.rand(1, 1, 5), counts, scale=1.0, softcap=softcap)
    torch.testing.assert_close(log_mass, logits)
    assert (shift == 0).all()


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_second_moment_is_closer_to_the_truth_on_gaussian_pages(softcap: float | None) -> None:
    query = torch.randn(1, 4, 64)
    keys = 0.6 * torch.randn(1, 1, 200, 16, 64) + 0.5 * torch.randn(1, 1, 200, 1, 64)
    mean, variance = keys.mean(3), keys.var(3, correction=0).mean(-1)
    counts = torch.full((1, 1, 200), 16, dtype=torch.int32)
    logits = torch.einsum("bhd,bznpd->bhnp", query, keys) / 8
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    truth = logits.logsumexp(-1)
    errors = [
        (score(query, mean, var, counts, scale=1 / 8, softcap=softcap)[0] - truth).abs().mean()
        for var in (None, variance)
    ]
    assert errors[1] < 0.5 * errors[0]


def test_correction_is_continuous_where_it_freezes() -> None:
    log_n = math.log(16)
    query = torch.ones(1, 1, 1)
    variance = torch.linspace(1.9 * log_n, 2.1 * log_n, 2001).view(1, 1, -1)
    counts = torch.full((1, 1, 2001), 16, dtype=torch.int32)
    log_mass = score(query, torch.zeros(1, 1, 2001, 1), variance, counts, scale=1.0)[0][0, 0]
    slope = log_mass.double().diff() / variance.double().flatten().diff()
    assert log_mass.diff().abs().max() < 1e-3
    assert slope.min() > 0.45
    assert slope.max() < 0.55
