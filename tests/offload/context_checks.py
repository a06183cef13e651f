"""What holds of a context at any time: each token once, pages as their counts and index say."""

from __future__ import annotations

import numpy as np
import torch
from offload_cases import D, Tokens, same_index
from torch import Tensor

from wavekv.index import page_scatter
from wavekv.index.levels import index_of_pages
from wavekv.kernels.page_index import PageIndex
from wavekv.offload import LayerContext
from wavekv.offload.paged import PagedZone

HEADS = 2
CODED = 0.1
"""The most that numbers stored in eight bits are off by here, however often a crop has them stored
anew."""


class Pair:
    """A context, and all that was given to it; pads[b] is where sequence b begins."""

    def __init__(self, context: LayerContext, tokens: Tokens, pads: list[int]) -> None:
        self.context, self.tokens, self.pads = context, tokens, pads


def is_coded(context: LayerContext) -> bool:
    return context.paged.arena.layout.codec is not None


def segments(pair: Pair) -> list[tuple[int, int]]:
    return pair.context.paged.segments


def page_ids(context: LayerContext) -> list[np.ndarray]:
    """The arena pages of a context, those under construction included."""
    paged = context.paged
    return [ids.flatten().numpy() for ids in (paged.page_ids.view, *paged._building)]


def check_tokens(pair: Pair) -> None:
    """Each valid token is held once for each head, with its own key and value, and no other is."""
    context, tokens = pair.context, pair.tokens
    B, H, T, _ = tokens.keys.shape
    assert context.shape == (B, H, D)
    assert context.num_tokens == T
    assert len(context.steady.valid) == len(context.steady.keys) == len(context.steady.values)
    times = torch.zeros(B, H, T, dtype=torch.int64)
    for positions, keys, values in (in_steady_zone(context), in_pages(context)):
        b, h, slot = (positions >= 0).nonzero(as_tuple=True)
        at = positions[b, h, slot]
        times.index_put_((b, h, at), torch.tensor(1), accumulate=True)
        atol = CODED if is_coded(context) else 0.0
        for found, given in ((keys, tokens.keys), (values, tokens.values)):
            assert ((found[b, h, slot] - given[b, h, at]).abs() <= atol).all()
    assert torch.equal(times, tokens.valid[:, None].expand(B, H, T).long())
    if context.steady.mask is None:
        assert context.steady.valid.view.all()


def in_steady_zone(context: LayerContext) -> tuple[Tensor, Tensor, Tensor]:
    """(positions [B, H, A + L], -1 for none; keys; values) of sink slots and the local window."""
    steady = context.steady
    B, H, _ = context.shape
    local = torch.arange(steady.start, steady.end).expand(B, -1)
    positions = torch.cat([steady.sink_positions.cpu(), local], 1)
    positions = positions.masked_fill(~steady.valid.view.cpu(), -1)
    # a slot is valid only where it has a position
    assert torch.equal(positions >= 0, steady.valid.view.cpu())
    positions = positions[:, None].expand(B, H, -1)
    return positions, steady.keys.view.cpu(), steady.values.view.cpu()


def in_pages(context: LayerContext) -> tuple[Tensor, Tensor, Tensor]:
    """The same of all page slots."""
    paged, (B, H, _) = context.paged, context.shape
    pages = paged.arena.read(paged.page_ids.view.reshape(-1))
    n, P = paged.num_pages, paged.arena.layout.page_size
    pages = pages.reshape(B, H, n, 2, P, D)
    positions = paged.token_ids.view.long().reshape(B, H, n * P)
    keys, values = (pages[:, :, :, half].reshape(B, H, n * P, D) for half in range(2))
    return positions, keys, values


def check_pages(context: LayerContext) -> None:
    """Counts, statistics and segments of the paged zone describe what its pages hold."""
    paged = context.paged
    held = paged.token_ids.view >= 0
    P = held.shape[-1]
    counts = paged.counts.view
    assert torch.equal(held, torch.arange(P) < counts[..., None])
    assert torch.equal(paged.index.view.counts.cpu(), counts.to(torch.uint8))
    assert {len(part) for part in paged._parts()} == {paged.num_pages}
    assert paged.num_tokens == context.steady.start == paged.num_pages * P
    assert [stop for stop, _ in paged.segments] == [pages * P for _, pages in paged.segments]
    _, keys, values = in_pages(context)
    if not is_coded(context):
        # what is stored in few bits says too little of means and of sums of squares
        check_index(paged, keys, values)
        check_scatter(paged, keys, values)


def check_index(paged: PagedZone, keys: Tensor, values: Tensor) -> None:
    """The index is what the pages make."""
    B, H, N = paged.counts.view.shape
    P = paged.arena.layout.page_size
    keys, values = (x.reshape(B * H, N, P, D) for x in (keys, values))
    counts = paged.counts.view.reshape(B * H, N)
    expected = index_of_pages(keys, values, counts, paged.index.block_pages)
    found = PageIndex._make(part.cpu().flatten(0, 1) for part in paged.index.view)
    same_index(found, expected)


def check_scatter(paged: PagedZone, keys: Tensor, values: Tensor) -> None:
    """Each span has the scatter of its own pages, a page of four tokens being 3 % of a span."""
    B, H, N = paged.counts.view.shape
    P = paged.arena.layout.page_size
    keys, values = (x.reshape(B * H, N, P, D) for x in (keys, values))
    counts, size = paged.counts.view.reshape(B * H, N), paged.scatter.span_pages
    spans = paged.scatter.spans.view.cpu()
    assert paged.statistics_nbytes == spans.nbytes + paged.index.nbytes
    assert spans.shape == (B, H, -(-N // size), 2, D, D)
    for number in range(spans.shape[2]):
        part = slice(number * size, (number + 1) * size)
        expected = page_scatter(keys[:, part], values[:, part], counts[:, part])
        found = spans[:, :, number].reshape(B * H, 2, D, D)
        # what is kept was rounded with each segment
        error = (found.float() - expected).norm(dim=(2, 3))
        assert (error <= 0.01 * expected.norm(dim=(2, 3)) + 1e-4).all()
