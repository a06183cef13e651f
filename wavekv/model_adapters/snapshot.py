"""Cheap copies of cache layers that stay as transformers made them, to undo a failed forward."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers import cache_utils


def snapshot(layer: Any) -> dict[str, Any]:
    """What `restore` needs to put a layer back after a forward.

    Attention layers replace their tensors, so these are kept by reference; linear-attention layers
    write into theirs (held in dicts), so those are copied. Unknown classes are copied whole.
    """
    if type(layer).__module__ != cache_utils.__name__:
        return dict(vars(copy.deepcopy(layer)))
    return {name: _kept(value) for name, value in vars(layer).items()}


def restore(layer: Any, state: dict[str, Any]) -> None:
    """Put a layer back to what `snapshot` saw."""
    vars(layer).clear()
    vars(layer).update(state)


def _kept(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: x.clone() if isinstance(x, Tensor) else x for key, x in value.items()}
