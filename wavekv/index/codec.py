"""The codec: the space in which keys are clustered and coded.

A key k becomes z = (k - centre) F, a query q becomes y = q B, with F B^T the identity, so that
y.z = q.k - q.centre: ranking is unchanged, and rounding errors of z fall where the codec wants.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_RIDGE = 0.1
"""Share of the mean second moment of the queries that every direction gets: a sample is small, and
the queries to come drift (SMAQ: an unshrunk metric is unstable)."""


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
    """W, a multiple of 8; with D below it, the rest is zero."""

    def keys(self, keys: Tensor) -> Tensor:
        """[H, S, D] any float dtype -> z [H, S, D] float32."""
        return torch.bmm(keys.float() - self.centre.unsqueeze(1), self.forward)

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


def metric_codec(keys: Tensor, metric: Tensor | None, code_dims: int) -> KeyCodec:
    """The codec of a metric alone: distances of z are errors of inner products as queries of that
    metric see them (A2ATS, 2025, clusters in it too). None: all directions count the same.

    keys: [H, S, D], S >= 1, to take the centre from.
    """
    H, _, D = keys.shape
    centre = keys.float().mean(1)
    if metric is None:
        forward = backward = torch.eye(D, device=keys.device).expand(H, D, D)
    else:
        power = metric.double()
        values, vectors = torch.linalg.eigh(power)
        root = values.clamp_min(torch.finfo(torch.float32).tiny).sqrt().unsqueeze(1)
        forward = ((vectors * root) @ vectors.mT).float()
        backward = ((vectors / root) @ vectors.mT).float()
    return KeyCodec(centre, forward.contiguous(), backward.contiguous(), code_dims)


def spread_codec(codec: KeyCodec, scatter: Tensor) -> KeyCodec:
    """Turn the space of a codec so that its codes lose least.

    The first `code_dims` directions become those in which keys vary most inside their pages
    (scatter [H, D, D], of z); the rest of a key's residual has no code. Both parts are then mixed:
    no direction stands out, which is what one scale for a whole key wants (QuaRot, 2024).
    """
    D = scatter.shape[-1]
    turn = torch.linalg.eigh(scatter.double()).eigenvectors.flip(2)
    W = min(codec.code_dims, D)
    mix = torch.block_diag(_mixing(W), *([_mixing(D - W)] if D > W else []))
    turn = (turn @ mix.to(turn)).float()
    return KeyCodec(codec.centre, codec.forward @ turn, codec.backward @ turn, codec.code_dims)


def _mixing(size: int) -> Tensor:
    """An orthogonal matrix [n, n] with entries of about the same size: a cosine transform with
    signs from a Weyl sequence."""
    n = torch.arange(size, dtype=torch.float64)
    matrix = math.sqrt(2 / size) * torch.cos(math.pi / size * n[:, None] * (n + 0.5))
    matrix[0] /= math.sqrt(2)
    signs = torch.where(n * 40503 % 65536 < 32768, 1.0, -1.0).double()
    return signs[:, None] * matrix.T
