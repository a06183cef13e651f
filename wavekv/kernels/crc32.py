"""CRC-32 of rows and pages in CPU memory, each as `zlib.crc32` computes it, on all threads.

`zlib.crc32` takes one buffer a call, and lets other threads run only while a buffer is large:
pages of 4 KiB get no faster with more cores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LAUNCH_BYTES = 256
"""So many bytes count as a row in `launch`."""


def crc32_rows(rows: Tensor) -> Tensor:
    """The checksums [n] int64, 0 <= crc < 2**32, of rows [n, nbytes] uint8, contiguous on the CPU.

    Raises:
        ValueError: the rows are anything else.
    """
    if rows.dim() != 2 or rows.dtype != torch.uint8:
        raise ValueError(f"rows must be [n, nbytes] uint8, got {tuple(rows.shape)} {rows.dtype}")
    return crc32_pages([rows], torch.arange(len(rows)), rows.shape[1])


def crc32_pages(chunks: Sequence[Tensor], ids: Tensor, page_bytes: int) -> Tensor:
    """The checksums [n] int64 of pages ids [n] int64: page i is row i % C of `chunks[i // C]`.

    chunks: any shapes [C, ...] and dtypes whose rows are `page_bytes` bytes, contiguous on the CPU.

    Raises:
        ValueError: chunks or ids are anything else, or an id is out of range.
    """
    from wavekv.kernels import cpu_crc32
    from wavekv.kernels.cpu_launch import launch

    if ids.dim() != 1 or ids.dtype != torch.int64 or ids.device.type != "cpu":
        raise ValueError(f"ids must be [n] int64 on the CPU, got {tuple(ids.shape)} {ids.dtype}")
    chunk_pages = len(chunks[0]) if chunks else 0
    for chunk in chunks:
        nbytes = chunk.numel() * chunk.element_size()
        if len(chunk) != chunk_pages or nbytes != chunk_pages * page_bytes:
            raise ValueError(
                f"chunks must hold {chunk_pages} rows of {page_bytes} bytes each, "
                f"got {tuple(chunk.shape)} {chunk.dtype}"
            )
        if not chunk.is_contiguous() or chunk.device.type != "cpu":
            raise ValueError(
                f"chunks must be contiguous on the CPU, got strides {chunk.stride()} on "
                f"{chunk.device}"
            )
    crcs = torch.empty(len(ids), dtype=torch.int64)
    addresses = torch.tensor([chunk.data_ptr() for chunk in chunks], dtype=torch.int64)
    rows = len(ids) * page_bytes // _LAUNCH_BYTES
    # fmt: off
    is_inside = launch(cpu_crc32.crc32_pages, rows, addresses.numpy(), chunk_pages, page_bytes,
                       ids.contiguous().numpy(), crcs.numpy())
    # fmt: on
    if not is_inside:
        raise ValueError(f"ids must be in [0, {len(chunks) * chunk_pages}), got others")
    return crcs


def crc32_joined(crcs: Tensor, nbytes: int, first: int = 0) -> int:
    """The checksum of n blocks of `nbytes` bytes joined together, from those of the blocks.

    crcs: [n] int64. first: the checksum of what stands before them. Costs some 30 ns a block.
    """
    from wavekv.kernels import cpu_crc32

    return int(cpu_crc32.crc32_joined(crcs.contiguous().numpy(), nbytes, first))
