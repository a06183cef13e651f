"""How fast a device multiplies, attends, copies, and builds pages."""

from __future__ import annotations

from collections.abc import Callable

import torch

from wavekv.index.params import BLOCK_PAGES
from wavekv.kernels.block import attend_block
from wavekv.machine.clock import best_device_seconds, best_seconds
from wavekv.offload.builder import form_pages

_COPY_BYTES = 1 << 30
HEAD_DIMS = (64, 128)
"""At which attention is measured."""


def matmul_flops(device: torch.device) -> float:
    """FLOP a second of a square product: bfloat16 on CUDA, float32 on a CPU."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = torch.randn(2, size, size, device=device, dtype=_dtype(device))
    out = torch.empty_like(left)
    return 2 * size**3 / _best(lambda: torch.mm(left, right, out=out), device)


def attention_flops(device: torch.device, head_dim: int) -> float:
    """FLOP a second of a chunk of queries that attends to one block of pages, as a prefill does, of
    32 query heads and 8 KV heads (fewer on a CPU)."""
    heads, tokens = (32, 8192) if device.type == "cuda" else (8, 1024)
    dtype = _dtype(device)
    query = torch.randn(1, heads, tokens, head_dim, device=device, dtype=dtype)
    keys, values = torch.randn(2, 1, heads // 4, tokens, head_dim, device=device, dtype=dtype)
    scale = head_dim**-0.5
    seconds = _best(lambda: attend_block(query, keys, values, scale=scale), device, repeats=3)
    return 4 * heads * head_dim * tokens**2 / seconds


def page_build(device: torch.device) -> float:
    """Tokens of a KV head of 128 dimensions a second that become pages, in segments of 8192."""
    heads = 8 if device.type == "cuda" else 1
    keys, values = torch.randn(2, heads, 8192, 128, device=device, dtype=_dtype(device))
    seconds = _best(lambda: form_pages(keys, values, None, 8, BLOCK_PAGES), device, repeats=2)
    return heads * 8192 / seconds


def device_copy(device: torch.device) -> float:
    """Bytes a second of a copy inside the device, read and written."""
    size = min(_COPY_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_device_seconds(lambda: target.copy_(source), repeats=10)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _best(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    best = best_device_seconds if device.type == "cuda" else best_seconds
    return best(run, repeats=repeats)
