"""The codec: the space in which keys are coded.

A key k becomes z = (k - centre) F, a query q becomes y = q B, with F B^T the identity, so that
y.z = q.k - q.centre: ranking is unchanged, and rounding errors of z fall where the codec wants.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from wavekv.kernels.mixing import mixing

_RIDGE = 0.1
"""Share of the mean second moment of the queries that every direction gets: a sample is small, and
the queries to come drift (SMAQ: an unshrunk metric is unstable)."""
_KEPT = 0.98
"""Share of the variance of keys inside pages, as queries see it, that codes keep by default."""

_CODES_PER_VECTOR = 128
"""Codes of a page come in vectors of so many; part of one costs as much as a whole."""


@dataclass(frozen=True, slots=True)
class KeyCodec:
    """An affine map for each of H heads; float32."""

    centre: Tensor
    """[H, D]"""
    forward: Tensor
    """[H, D, D], F: the first `code_dims` columns are those that keys have codes of."""
    backward: Tensor
    """[H, D, D], B."""
    code_dims: int
    """W, a multiple of 8: at most D rounded up to one."""

    def keys(self, keys: Tensor) -> Tensor:
        """[H, n, P, D] any float dtype -> z [H, n, P, D] float32."""
        z = torch.bmm(keys.flatten(1, 2).float() - self.centre.unsqueeze(1), self.forward)
        return z.view(keys.shape)

    def queries(self, queries: Tensor) -> Tensor:
        """[H, Q, D] float32 -> y [H, Q, D rounded up to a multiple of 8] float32."""
        turned = torch.bmm(queries, self.backward)
        missing = -turned.shape[-1] % 8
        return torch.nn.functional.pad(turned, (0, missing)) if missing else turned


def query_metric(queries: Tensor) -> Tensor:
    """The shrunk second moment of a sample of queries: [H, S, D] -> [H, D, D] float32, with a mean
    eigenvalue of 1. It says which directions of an error queries see."""
    q = queries.double()
    moment = q.mT @ q
    D = moment.shape[-1]
    level = moment.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float32).tiny)
    shrunk = moment / level[:, None, None] + _RIDGE * torch.eye(D, device=q.device)
    return (shrunk / (1 + _RIDGE)).float()


def clustering_map(metric: Tensor) -> Tensor:
    """[H, D, D]: the space to cluster keys in, the fourth root of a metric.

    Half-way between distances of keys and distances as queries see them (the square root): pages
    are found about as well as in the latter, and keys spread less in what queries see little of,
    which codes drop.
    """
    return _power(metric, 0.25).float()


def train_codec(
    segments: Iterable[Tensor], metric: Tensor | None, code_dims: int | None
) -> KeyCodec:
    """The codec for pages like those of `segments`, [H, n, P, D] each.

    In the square root of the metric an error counts as queries see it (A2ATS, 2025). The first
    directions of z are those in which keys vary most inside their pages, then all are mixed, so
    that none stands out: one scale serves a whole key (QuaRot, 2024).

    code_dims: how many directions get a code; None: all without a metric, else as many as keep 98 %
    of the variance in every head.
    """
    total, count, scatter, page_size = None, 0, None, 1
    for pages in segments:
        keys = pages.float()
        residual = (keys - keys.mean(2, keepdim=True)).flatten(1, 2)
        part, within = keys.sum((1, 2)), residual.mT @ residual
        total = part if total is None else total + part
        scatter = within if scatter is None else scatter + within
        page_size = keys.shape[2]
        count += keys.shape[1] * page_size
    assert total is not None
    assert scatter is not None
    D = scatter.shape[-1]
    root = torch.eye(D, device=scatter.device).double().expand(scatter.shape)
    inverse = root
    if metric is not None:
        root, inverse = _power(metric, 0.5), _power(metric, -0.5)
    spread, turn = torch.linalg.eigh(root @ scatter.double() @ root)
    spread, turn = spread.flip(1), turn.flip(2)
    most = -(-D // 8) * 8
    if code_dims is None:
        unit = max(8, _CODES_PER_VECTOR // page_size)
        code_dims = most if metric is None else min(most, _dims_to_keep(spread, unit))
    W = min(code_dims, D)
    mix = torch.block_diag(mixing(W), *([mixing(D - W)] if D > W else []))
    turn = turn @ mix.to(turn)
    forward, backward = (root @ turn).float(), (inverse @ turn).float()
    return KeyCodec(total / count, forward, backward, code_dims)


def _dims_to_keep(spread: Tensor, unit: int) -> int:
    """How many of the variances [H, D], largest first, hold `_KEPT` of all in every head; rounded
    up to a multiple of `unit`."""
    left = spread.clamp_min(0)
    wanted = _KEPT * left.sum(1, keepdim=True)
    dims = int((left.cumsum(1) < wanted).sum(1).max()) + 1
    return -(-dims // unit) * unit


def _power(metric: Tensor, exponent: float) -> Tensor:
    """A power of positive definite matrices, float64."""
    values, vectors = torch.linalg.eigh(metric.double())
    powers = values.clamp_min(torch.finfo(torch.float32).tiny) ** exponent
    power: Tensor = (vectors * powers.unsqueeze(1)) @ vectors.mT
    return power
