"""Weights as int8 rows with a float16 scale each: what the demo model ships as."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_SCALE = ".row_scale"


def quantise_rows(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Round matrices [out, in] to int8, a float16 scale a row; other tensors stay float32."""
    packed: dict[str, Tensor] = {}
    for name, weight in state.items():
        weight = weight.detach().float().cpu()
        if weight.ndim != 2:
            packed[name] = weight.contiguous()
            continue
        scale = (weight.abs().amax(1, keepdim=True) / 127).clamp_min(1e-7).half()
        packed[name] = (weight / scale.float()).round().clamp(-127, 127).to(torch.int8)
        packed[name + _SCALE] = scale.squeeze(1)
    return packed


def restore_rows(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `quantise_rows`: float32 tensors under their own names."""
    state: dict[str, Tensor] = {}
    for name, weight in packed.items():
        if name.endswith(_SCALE):
            continue
        scale = packed.get(name + _SCALE)
        state[name] = weight if scale is None else weight.float() * scale.float()[:, None]
    return state
