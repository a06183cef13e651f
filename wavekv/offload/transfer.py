"""Bringing the pages of a step to where the query is, by way of the host arena.

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
    num_from_disk: int
    """How many were not in host memory."""


def fetch_pages(zone: PagedZone, page_ids: Tensor, device: torch.device) -> ReadablePages:
    """Make pages readable from `device`.

    page_ids: [B, Hkv, M] arena ids on the host, -1 for none.
    """
    layout, host = zone.arena.layout, zone.arena.host
    brought = zone.arena.bring(page_ids)
    if device.type == "cpu":
        return ReadablePages(host.chunks, brought.slots, layout.codec, brought.num_read)
    wanted = brought.slots.reshape(-1)
    present = (wanted >= 0).nonzero().squeeze(1)
    local = torch.full_like(wanted, -1)
    local[present] = torch.arange(len(present))
    # one row at least: kernels take no chunk of none
    shape = max(1, len(present)), *layout.stored_shape
    pages = torch.empty(shape, dtype=layout.stored_dtype, pin_memory=True)
    host.gather(wanted[present], out=pages[: len(present)])
    chunk = layout.decode(pages.to(device))
    local = local.reshape(page_ids.shape).to(device)
    return ReadablePages([chunk], local, None, brought.num_read)
