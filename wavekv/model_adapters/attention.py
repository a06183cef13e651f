"""The attention and mask functions that wavekv registers with transformers under one name.

A cache layer tags the keys it was given; the attention function finds the layer through the tag.
Layers without a tag (sliding windows, vision towers, calls without a cache) attend as usual.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from wavekv.errors import UnsupportedModelError
from wavekv.offload import Logits

if TYPE_CHECKING:
    from wavekv.model_adapters.layer import OffloadedLayer

NAME = "wavekv"
_TAG = "_wavekv_layer"
_NOT_EXPRESSED = {
    "position_bias": "a bias on the logits",
    "indices": "a selection of keys by the model itself",
    "block_indices": "a selection of keys by the model itself",
    "sinks": "sinks that depend on the query",
    "output_attentions": "a request for attention weights, which are never all computed",
}


def tag(keys: Tensor, layer: OffloadedLayer) -> None:
    """Mark keys as belonging to an offloaded layer."""
    setattr(keys, _TAG, layer)


def offloaded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the contract of transformers: [B, H, T, D] in, ([B, T, H, D], None) out.

    Raises:
        UnsupportedModelError: the model asks for what states over zones cannot express.
    """
    for name, meaning in _NOT_EXPRESSED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise UnsupportedModelError(
                f"expected plain attention from {type(module).__name__}, got {name} ({meaning}), "
                "which wavekv cannot express; leave this out, or the model unwrapped"
            )
    logits = Logits(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap)
    layer: OffloadedLayer | None = getattr(key, _TAG, None)
    if layer is not None:
        if sliding_window is not None:
            raise UnsupportedModelError(
                f"expected full attention where the cache has no window, got sliding_window="
                f"{sliding_window} from {type(module).__name__}; this model type is not supported"
            )
        out = layer.attend(module, query, key, value, attention_mask, logits, s_aux)
    else:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        mask = _full_mask(attention_mask, query, key, causal)
        out = _attend_dense(
            query, key, value, mask, logits, s_aux, dropout if module.training else 0.0
        )
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def offloaded_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a layer: padding [B, kv_length] (None without any) for plain causal layers, which
    may be offloaded; [B, 1, q_length, kv_length] for all others (windows, chunks, images)."""
    if mask_function is causal_mask_function:
        if attention_mask is None:
            return None
        padding = attention_mask[:, -kv_length:].bool()
        return None if bool(padding.all()) else padding
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )
    return mask


def register() -> None:
    """Add the two functions to transformers under `NAME`. Nothing else changes; may be repeated."""
    AttentionInterface.register(NAME, offloaded_attention)
    AttentionMaskInterface.register(NAME, offloaded_mask)


def _full_mask(mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
    """[B or 1, 1, T, S] bool from what `offloaded_mask` gave; None if everything is visible."""
    if mask is not None and mask.ndim == 4:
        return mask
    T, S = query.shape[2], key.shape[2]
    full = None if mask is None else mask[:, None, None, -S:]
    if causal and T > 1:
        steps = torch.arange(S, device=query.device)
        earlier = steps <= torch.arange(S - T, S, device=query.device)[:, None]
        full = earlier[None, None] if full is None else full & earlier
    return full


def _attend_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    logits: Logits,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """Attention over keys that are all here. mask: [B, 1, T, S] bool. Returns [B, Hq, T, D]."""
    if logits.softcap is None and sinks is None:
        return nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            scale=logits.scale,
            enable_gqa=True,
        )
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    weights = (query.float() @ key.float().transpose(2, 3)) * logits.scale
    if logits.softcap is not None:
        weights = torch.tanh(weights / logits.softcap) * logits.softcap
    if mask is not None:
        weights = weights.masked_fill(~mask, torch.finfo(weights.dtype).min)
    if sinks is not None:
        column = sinks.float().reshape(1, -1, 1, 1).expand(*weights.shape[:-1], 1)
        weights = torch.cat([weights, column], -1).softmax(-1)[..., :-1]
    else:
        weights = weights.softmax(-1)
    return nn.functional.dropout(weights, dropout) @ value.float()
