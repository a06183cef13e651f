"""What an index accepts: the keys it is made for, then keys, values and queries like those."""

from __future__ import annotations

import torch
from torch import Tensor

from wavekv.errors import DtypeError, InputError
from wavekv.index import inputs
from wavekv.index.codec import query_metric
from wavekv.index.inputs import Array
from wavekv.index.params import IndexParams
from wavekv.index.state import IndexState

_MAX_KEYS = 2**31 - 1
"""Ids are kept as int32."""


def empty_state_for(
    keys: Array, query_sample: Array | None, params: IndexParams, *, has_values: bool
) -> IndexState:
    """A state without keys, for such keys [H, N, D] or [N, D] and the queries of a sample
    [H, S, D] or [S, D].

    Raises:
        InputError, DtypeError, ConfigError: as `WaveIndex.build`.
    """
    like, is_flat = inputs.as_heads("keys", keys)
    metric = None
    if query_sample is not None:
        sample, _ = inputs.as_heads("query_sample", query_sample, is_flat=is_flat)
        H, _, D = like.shape
        inputs.expect_like("query_sample", sample, heads=H, dim=D, device=like.device)
        if sample.shape[1] == 0:
            raise InputError("query_sample must hold a query, got none; leave it out instead")
        inputs.expect_finite("query_sample", sample)
        metric = query_metric(sample)
    return IndexState(like[:, :0], params, is_flat=is_flat, has_values=has_values, metric=metric)


def accept_tokens(keys: Array, values: Array | None, state: IndexState) -> Tensor:
    """Keys, and values if the index has them, to add to it: a copy [H, 1 or 2, S, D].

    Raises:
        InputError, DtypeError: as `WaveIndex.append`.
    """
    new = [_accept_rows("keys", keys, state)]
    if (values is not None) != state.has_values:
        wanted = "values too" if state.has_values else "no values, as when it was built"
        raise InputError(f"this index wants {wanted}, got {'none' if values is None else 'some'}")
    if values is not None:
        new.append(_accept_rows("values", values, state))
        if new[0].shape != new[1].shape:
            raise InputError(
                f"values must be {tuple(new[0].shape)} as the keys, got {tuple(new[1].shape)}"
            )
    total = state.num_keys + new[0].shape[1]
    if total > _MAX_KEYS:
        raise InputError(f"an index holds at most {_MAX_KEYS} keys a head, got {total}")
    return torch.stack(new, 1)


def accept_length(n: int, state: IndexState) -> int:
    """A number of keys that the index has, to keep.

    Raises:
        InputError: as `WaveIndex.truncate`.
    """
    n = inputs.expect_count("n", n, least=0)
    if n > state.num_keys:
        raise InputError(f"n must be at most ntotal={state.num_keys}, got {n}")
    return n


def accept_queries(
    queries: Array, state: IndexState, group: int, *, check_finite: bool, is_attend: bool = False
) -> Tensor:
    """Queries in groups of `group`, to search or to attend with: [H, Q, D] float32, contiguous.

    Raises:
        InputError, DtypeError: as `WaveIndex.search` and `WaveIndex.attend`.
    """
    if is_attend and not state.has_values:
        raise InputError("attend needs values, got an index without: build(keys, values=...)")
    tensor = _accept_shape("queries", queries, state)
    inputs.expect_count("group", group)
    if tensor.shape[1] % group:
        raise InputError(f"queries must come in groups of {group}, got {tensor.shape[1]} of them")
    if check_finite:
        largest = inputs.LARGEST_ATTENDED if is_attend else inputs.LARGEST
        inputs.expect_finite("queries", tensor, largest=largest)
    return tensor.float().contiguous()


def _accept_rows(name: str, array: Array, state: IndexState) -> Tensor:
    """Keys or values [H, S, D] of the type of the index."""
    tensor, dtype = _accept_shape(name, array, state), state.tail.dtype
    if tensor.dtype != dtype:
        raise DtypeError(f"{name} must be {dtype} as the index, got {tensor.dtype}")
    largest = inputs.LARGEST_ATTENDED if state.has_values else inputs.LARGEST
    inputs.expect_finite(name, tensor, largest=largest)
    return tensor


def _accept_shape(name: str, array: Array, state: IndexState) -> Tensor:
    """[H, S, D] with the heads, dimensions and device of the index."""
    tensor, _ = inputs.as_heads(name, array, is_flat=state.is_flat)
    H, _, _, D = state.tail.shape
    inputs.expect_like(name, tensor, heads=H, dim=D, device=state.tail.device)
    return tensor
