"""Cache layers that stay as transformers made them (sliding windows, recurrent states), as plain
arrays and values, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from wavekv.errors import CacheError, LayoutError

_PLAIN = bool, int, float, str, type(None)
_MADE_LATER = {"keys": Tensor, "values": Tensor, "dtype": torch.dtype, "device": torch.device}
"""What a layer has once it holds tokens."""
_CONSTANT = "sliding_window", "number_of_states"
"""What is of the model, not of its tokens."""


def store_other(layer: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(values that JSON holds, tensors) of a layer.

    Raises:
        CacheError: the layer holds something else.
    """
    values: dict[str, Any] = {"class": type(layer).__name__}
    tensors: dict[str, Tensor] = {}
    for name, value in vars(layer).items():
        if isinstance(value, Tensor):
            values[name] = _keep(tensors, name, value)
        elif isinstance(value, dict):
            values[name] = {"dict": _stored_dict(layer, name, value, tensors)}
        elif isinstance(value, torch.dtype):
            values[name] = {"dtype": str(value).removeprefix("torch.")}
        elif isinstance(value, torch.device):
            values[name] = {"device": True}
        elif isinstance(value, _PLAIN):
            values[name] = value
        else:
            raise _unsaved(layer, name, value)
    return values, tensors


def restore_other(
    layer: Any, values: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device
) -> None:
    """Make a fresh layer of the same class what was stored.

    Raises:
        LayoutError: it is of another class, or has other attributes.
    """
    kind = values.get("class")
    if kind != type(layer).__name__:
        raise LayoutError(f"class must be {type(layer).__name__}, got {kind!r}")
    fresh, names = vars(layer), set(values) - {"class"}
    if not set(fresh) <= names <= set(fresh) | _MADE_LATER.keys():
        raise LayoutError(f"attributes must be {sorted(fresh)}, got {sorted(names)}")
    parts = {name: _restored(values[name], tensors, device) for name in names}
    for name, value in fresh.items():
        _expect_alike(name, value, parts[name])
    _expect_tokens(parts)
    fresh.update(parts)


def _expect_tokens(parts: Mapping[str, Any]) -> None:
    """What a layer has once it holds tokens is there, if it says that it does."""
    for name, kind in _MADE_LATER.items():
        value = parts.get(name)
        if value is not None and not isinstance(value, kind):
            raise LayoutError(f"{name} must be a {kind.__name__}, got {value!r}")
    lacking = sorted(name for name in _MADE_LATER if parts.get(name) is None)
    if "is_initialized" in parts and parts["is_initialized"] != (not lacking):
        raise LayoutError(f"is_initialized must be {not lacking} of a layer that lacks {lacking}")


def _expect_alike(name: str, fresh: Any, found: Any) -> None:
    """Of the type that a fresh layer has there; None becomes anything with the first tokens."""
    if fresh is not None and type(found) is not type(fresh):
        raise LayoutError(f"{name} must be of type {type(fresh).__name__}, got {found!r}")
    if name in _CONSTANT and found != fresh:
        raise LayoutError(f"{name} must be {fresh!r}, got {found!r}")
    if isinstance(fresh, Tensor) and (fresh.dim(), fresh.dtype) != (found.dim(), found.dtype):
        raise LayoutError(f"{name} must be like {fresh!r}, got {found!r}")
    if not isinstance(fresh, dict):
        return
    if found.keys() != fresh.keys():
        raise LayoutError(f"{name} must have the keys {list(fresh)}, got {list(found)}")
    for key, value in fresh.items():
        _expect_alike(f"{name}.{key}", value, found[key])


def _stored_dict(
    layer: Any, name: str, value: dict[Any, Any], tensors: dict[str, Tensor]
) -> list[list[Any]]:
    """[key, value] pairs: JSON has no numbers as keys."""
    pairs: list[list[Any]] = []
    for key, part in value.items():
        if not isinstance(key, (int, str)):
            raise _unsaved(layer, name, value)
        if isinstance(part, Tensor):
            pairs.append([key, _keep(tensors, f"{name}.{key}", part)])
        elif isinstance(part, _PLAIN):
            pairs.append([key, part])
        else:
            raise _unsaved(layer, name, part)
    return pairs


def _keep(tensors: dict[str, Tensor], name: str, tensor: Tensor) -> dict[str, Any]:
    # files hold no scalars
    tensors[name] = tensor.reshape(1) if tensor.dim() == 0 else tensor
    return {"tensor": name, "is_scalar": tensor.dim() == 0}


def _restored(value: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    if not isinstance(value, dict):
        return value
    if "device" in value:
        return device
    if "dtype" in value:
        dtype = getattr(torch, str(value["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise LayoutError(f"dtype must be one of torch, got {value['dtype']!r}")
        return dtype
    if "dict" in value:
        pairs = value["dict"]
        if not isinstance(pairs, list) or any(len(pair) != 2 for pair in pairs):
            raise LayoutError(f"dict must be pairs of a key and a value, got {pairs!r}")
        return {key: _restored(part, tensors, device) for key, part in pairs}
    tensor = tensors.get(str(value.get("tensor")))
    if tensor is None:
        raise LayoutError(f"tensors must be among {sorted(tensors)}, got {value!r}")
    # not the mapped memory: these layers are small, and change all of it
    tensor = tensor.to(device, copy=True)
    is_scalar = value.get("is_scalar")
    if not isinstance(is_scalar, bool):
        raise LayoutError(f"is_scalar must be true or false, got {is_scalar!r}")
    if not is_scalar:
        return tensor
    if tensor.numel() != 1:
        raise LayoutError(f"a scalar must be one number, got {tuple(tensor.shape)}")
    return tensor.reshape(())


def _unsaved(layer: Any, name: str, value: Any) -> CacheError:
    return CacheError(
        f"expected cache layers of tensors and plain values, got {type(layer).__name__}.{name} of "
        f"type {type(value).__name__}, which a saved context does not hold"
    )
