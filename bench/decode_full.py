"""Full attention over keys and values in device memory: the decode step that others are held to."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from decode_model import CapturedForward, free_bytes, layer_kv_bytes, time_steps
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import flash_attention_mask

BACKENDS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)
CPU_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
IMPLEMENTATION = "whole_context"
RESERVE = 3 << 30
"""Device memory kept free of keys and values: for temporaries and the workspaces of libraries."""


class FullLayer(DynamicLayer):
    """A full cache of fixed place: a new token is written at `position` and all slots are read."""

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.position = keys, values, position
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        self.keys.index_copy_(2, self.position, key_states)
        self.values.index_copy_(2, self.position, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0


def whole_context_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention of one token to every slot of a full cache, so without a mask."""
    out = F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, whole_context_attention)
# transformers' mask for SDPA is materialised while a graph is captured; this one is None.
AttentionMaskInterface.register(IMPLEMENTATION, flash_attention_mask)


class FullAttentionInHBM:
    """The model's decode step over keys and values in device memory.

    Where those of all layers do not fit, layers take turns with as many as do: each pair is far
    larger than the L2 cache, so a step reads the same bytes.
    """

    def __init__(
        self, model: LlamaForCausalLM, tokens: int, batch: int = 1, *, seed: int = 0
    ) -> None:
        config, device = model.config, model.device
        layers = config.num_hidden_layers
        room = (free_bytes(device) - RESERVE) // layer_kv_bytes(model, tokens, batch)
        self.kv_buffers = min(layers, room)
        if self.kv_buffers < min(layers, 2):
            raise MemoryError("keys and values of two layers do not fit the device")
        generator = torch.Generator(device).manual_seed(seed)
        self.buffers = [random_kv(model, tokens, batch, generator) for _ in range(self.kv_buffers)]
        self.position = torch.full((1,), tokens - 1, dtype=torch.long, device=device)
        self.token_ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.model, self.cache = model, DynamicCache(config=config)
        self.cache.layers = [
            FullLayer(*self.buffers[layer % self.kv_buffers], self.position)
            for layer in range(layers)
        ]
        self.layer_ms = backend_times(self.buffers[:4], config.num_attention_heads)
        self.backend = min(self.layer_ms, key=self.layer_ms.get)

    def step(self) -> Tensor:
        """Logits [B, 1, V] of the latest token; the next one, the likeliest, takes its place."""
        self.model.set_attn_implementation(IMPLEMENTATION)
        with sdpa_kernel(self.backend):
            logits = self.model(
                input_ids=self.token_ids,
                position_ids=self.position.expand(len(self.token_ids), 1),
                past_key_values=self.cache,
                use_cache=True,
            ).logits
        self.token_ids.copy_(logits.argmax(-1))
        return logits


def random_kv(
    model: LlamaForCausalLM, tokens: int, batch: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Normal keys and values of a layer, [B, Hkv, T, D] each, in the model's type and place."""
    config = model.config
    shape = (batch, config.num_key_value_heads, tokens, config.head_dim)
    keys, values = (
        torch.empty(shape, dtype=model.dtype, device=model.device).normal_(generator=generator)
        for _ in range(2)
    )
    return keys, values


def backend_times(kv: list[tuple[Tensor, Tensor]], query_heads: int) -> dict[SDPBackend, float]:
    """Median ms of one query's attention to a layer, for each backend of SDPA that can do it.

    A step goes over all the given layers in turn, so that none stays in the L2 cache.
    """
    keys = kv[0][0]
    query = torch.randn(
        keys.shape[0], query_heads, 1, keys.shape[3], device=keys.device, dtype=keys.dtype
    )
    times = {}
    for backend in BACKENDS if keys.is_cuda else CPU_BACKENDS:
        try:
            captured = CapturedForward(attention_to_all(query, kv, backend))
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            continue  # "No available kernel"
        found = time_steps(captured.replay, warmup=3, repeats=20, device=keys.device)
        times[backend] = median(found) / len(kv)
    if not times:
        raise RuntimeError("no backend of scaled_dot_product_attention can do this attention")
    return times


def attention_to_all(
    query: Tensor, kv: list[tuple[Tensor, Tensor]], backend: SDPBackend
) -> Callable[[], Tensor]:
    """The attention of one query to each of these layers; returns the last output."""

    def forward() -> Tensor:
        with sdpa_kernel(backend):
            for keys, values in kv:
                out = F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
        return out

    return forward
