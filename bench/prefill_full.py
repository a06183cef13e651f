"""A chunked prefill with all keys and values in device memory: what wavekv's is held to.

The same model, chunks and attention operators; no pages, no index, no host.
"""

from __future__ import annotations

import torch
from decode_full import RESERVE
from decode_model import free_bytes, layer_kv_bytes
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import flash_attention_mask

from wavekv.kernels.block import attend_into

IMPLEMENTATION = "chunk_in_hbm"


class BufferLayer(DynamicLayer):
    """Keys and values [B, Hkv, T, D] in a buffer of fixed place, of which `length` are held."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.buffers, self.length = (keys, values), 0
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        end = self.length + key_states.shape[2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : end] = states
        self.length = end
        return tuple(buffer[:, :, :end] for buffer in self.buffers)

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0


def chunk_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """A chunk's attention to itself, then to all before it: two calls of fused operators."""
    before = key.shape[2] - query.shape[2]
    new, old = (tuple(x[:, :, part] for x in (key, value)) for part in _parts(before))
    state = attend_into(None, query, *new, scale=scaling, causal=True)
    if before:
        state = attend_into(state, query, *old, scale=scaling)
    return state[0].to(query.dtype).transpose(1, 2).contiguous(), None


def _parts(before: int) -> tuple[slice, slice]:
    return slice(before, None), slice(0, before)


AttentionInterface.register(IMPLEMENTATION, chunk_attention)
AttentionMaskInterface.register(IMPLEMENTATION, flash_attention_mask)


class BufferedPrefill:
    """Where the buffers of all layers do not fit, layers take turns with as many as do: that is the
    same arithmetic over other keys."""

    def __init__(self, model: LlamaForCausalLM, tokens: int, batch: int, working: int) -> None:
        """working: bytes to leave for the tensors of a forward."""
        config = model.config
        layers, size = config.num_hidden_layers, layer_kv_bytes(model, tokens, batch)
        room = (free_bytes(model.device) - max(RESERVE, working)) // size
        self.kv_buffers = min(layers, room)
        if self.kv_buffers < 1:
            raise MemoryError("keys and values of one layer do not fit the device")
        shape = batch, config.num_key_value_heads, tokens, config.head_dim
        self._held = [
            torch.empty(2, *shape, dtype=model.dtype, device=model.device)
            for _ in range(self.kv_buffers)
        ]
        self._model = model

    @torch.no_grad()
    def run(self, ids: Tensor, chunk: int) -> Tensor:
        """Logits [B, 1, V] after the last token."""
        model = self._model
        model.set_attn_implementation(IMPLEMENTATION)
        cache = DynamicCache(config=model.config)
        cache.layers = [
            BufferLayer(*self._held[layer % self.kv_buffers])
            for layer in range(model.config.num_hidden_layers)
        ]
        for start in range(0, ids.shape[1], chunk):
            part = ids[:, start : start + chunk]
            positions = torch.arange(start, start + part.shape[1], device=ids.device)
            inputs = {"input_ids": part, "position_ids": positions.expand_as(part)}
            inputs |= {"past_key_values": cache, "use_cache": True}
            if start + chunk < ids.shape[1]:
                model.base_model(**inputs)
        return model(**inputs, logits_to_keep=1).logits
