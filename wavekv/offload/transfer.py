"""Bringing the pages of a step from the host arena to where the query is.

On a CPU the arena is that place: pages are read in place. On CUDA they are gathered into pinned
memory and copied.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wavekv.kernels.page_codec import PageCodec
from wavekv.offload.paged import PagedZone


class ReadablePages(NamedTuple):
    """Pages as `attend_pages` takes them."""

    chunks: list[Tensor]
    ids: Tensor
    """[B, Hkv, M] int64 pages in the chunks, -1 for none."""
    codec: PageCodec | None
    """The form that they are in, if not [2, P, D]."""


def fetch_pages(zone: PagedZone, page_ids: Tensor, device: torch.device) -> ReadablePages:
    """Make pages readable from `device`.

    page_ids: [B, Hkv, M] arena ids on the host, -1 for none.
    """
    if device.type == "cpu":
        return ReadablePages(zone.arena.chunks, page_ids, zone.arena.layout.codec)
    wanted = page_ids.reshape(-1)
    present = (wanted >= 0).nonzero().squeeze(1)
    local = torch.full_like(wanted, -1)
    local[present] = torch.arange(len(present))
    layout = zone.arena.layout
    # one row at least: kernels take no chunk of none
    shape = max(1, len(present)), *layout.stored_shape
    pages = torch.empty(shape, dtype=layout.stored_dtype, pin_memory=True)
    zone.arena.gather(wanted[present], out=pages[: len(present)])
    chunk = layout.decode(pages.to(device))
    return ReadablePages([chunk], local.reshape(page_ids.shape).to(device), None)
