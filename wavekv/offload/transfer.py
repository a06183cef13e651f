"""Bringing the pages of a step from the host arena to where the query is.

On a CPU the arena is that place: pages are read in place. On CUDA they are gathered into pinned
memory and copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wavekv.offload.paged import PagedZone


def fetch_pages(
    zone: PagedZone, page_ids: Tensor, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Make pages readable from `device`: (chunks, ids into them) as `attend_pages` takes them.

    page_ids: [B, Hkv, M] arena ids on the host, -1 for none.
    """
    if device.type == "cpu":
        return zone.arena.chunks, page_ids
    wanted = page_ids.reshape(-1)
    present = (wanted >= 0).nonzero().squeeze(1)
    local = torch.full_like(wanted, -1)
    local[present] = torch.arange(len(present))
    layout = zone.arena.layout
    # one row at least: kernels take no chunk of none
    shape = max(1, len(present)), *layout.page_shape
    pages = torch.empty(shape, dtype=layout.dtype, pin_memory=True)
    zone.arena.read(wanted[present], out=pages[: len(present)])
    return [pages.to(device)], local.reshape(page_ids.shape).to(device)
