"""A model's decode steps on wavekv's engine, with queries from a walk instead of the model's own.

Random weights make random queries, which choose other pages in every step. Here everything of the
model runs, its query projection too, but attention gets the queries of `decode_walk.query_walk`, so
that a wanted share of pages recurs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from decode_model import CapturedForward
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import flash_attention_mask

from wavekv.kernels.step import END
from wavekv.model_adapters.early import guessed_query
from wavekv.offload import LayerContext, Logits
from wavekv.offload.engine import DecodeEngine
from wavekv.offload.engine_shape import engine_refusal

IMPLEMENTATION = "walked_engine"
_STEPS = "_bench_steps"


class EngineLayer(DynamicLayer):
    """Gives back only the new keys and values; the steps that they belong to come with them."""

    def __init__(self, steps: WalkedSteps, like: Tensor) -> None:
        super().__init__()
        self.steps, self.dtype, self.device = steps, like.dtype, like.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        keys = key_states.view(key_states.shape)
        setattr(keys, _STEPS, self.steps)
        return keys, value_states

    def get_seq_length(self) -> int:
        return self.steps.engine.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


def walked_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention of the engine, to the new token and all before it, with the walk's query."""
    out = getattr(key, _STEPS).attend(module.layer_idx, key, value)
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, walked_attention)
AttentionMaskInterface.register(IMPLEMENTATION, flash_attention_mask)


@dataclass
class Watched:
    """What one step did, by layer."""

    chosen: dict[int, Tensor] = field(default_factory=dict)
    """Pages [B, Hkv, M], -1 for none."""
    out: dict[int, Tensor] = field(default_factory=dict)
    """[B, Hq, 1, D]"""


class WalkedSteps:
    """Steps of a model over contexts that an engine has: one CUDA graph, or eager on a CPU."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        contexts: Sequence[LayerContext],
        walk: Tensor,
        guesses: Tensor | None = None,
    ) -> None:
        """walk: [S, layers, B, Hq, D] queries, gone through forwards and backwards. guesses: of the
        same shape, the queries that an early prefetch takes for those of the walk."""
        for number, context in enumerate(contexts):
            context.counters.last_query = walk[0, number]
        refusal = engine_refusal(contexts)
        if refusal is not None:
            raise RuntimeError(refusal)
        if walk.is_cuda:
            from wavekv.kernels import cuda as ops
        else:
            from wavekv.kernels import step_reference as ops
        self.engine = DecodeEngine(contexts, ops)
        self.model, self.walk, self.guesses = model, walk, guesses
        self.logits = Logits(walk.shape[-1] ** -0.5)
        there = torch.arange(len(walk), device=walk.device)
        self.order = torch.cat([there, there[1:-1].flip(0)])
        """Where in the walk each step is: back along it after its end."""
        self.number = torch.zeros(1, dtype=torch.int64, device=walk.device)
        self.token_ids = torch.zeros(walk.shape[2], 1, dtype=torch.int64, device=walk.device)
        self.cache = DynamicCache(config=model.config)
        self.cache.layers = [EngineLayer(self, walk) for _ in contexts]
        self._watched: Watched | None = None
        self._given: Tensor | None = None
        model.set_attn_implementation(IMPLEMENTATION)
        self.engine.before_step()
        self.engine.capture_growth()
        self.captured = CapturedForward(self._forward)
        self.engine.reset()
        self.number.zero_()

    def step(self) -> None:
        """Launch the next step."""
        if self.engine.is_full:
            raise RuntimeError("the engine has no room for more steps")
        self.engine.before_step()
        self.captured.replay()
        self.engine.after_step()

    @torch.no_grad()
    def watched_step(self, queries: Tensor | None = None) -> Watched:
        """Take the next step eagerly, and say what it did. queries: [layers, B, Hq, D] instead of
        those of the walk."""
        self._watched, self._given = Watched(), queries
        self.engine.before_step()
        self._forward()
        self.engine.after_step()
        watched, self._watched, self._given = self._watched, None, None
        return watched

    def attend(self, number: int, keys: Tensor, values: Tensor) -> Tensor:
        """Of layer `number`, in the forward that runs: [B, Hq, 1, D] float32."""
        query = self.queries[number].unsqueeze(2)
        out = self.engine.attend(number, query, keys, values, self.logits, None)
        if self._watched is not None:
            self._watched.chosen[number] = self.engine.scratch.chosen.clone()
            self._watched.out[number] = out.clone()
        return out

    def _forward(self) -> Tensor:
        at = self.order.index_select(0, self.number)
        self.queries = self.walk.index_select(0, at)[0] if self._given is None else self._given
        with self._prefetching(at):
            logits = self.model(
                input_ids=self.token_ids,
                position_ids=self.engine.counters[END : END + 1].long().expand_as(self.token_ids),
                past_key_values=self.cache,
                use_cache=True,
            ).logits
        self.token_ids.copy_(logits.argmax(-1))
        self.number.add_(1).remainder_(len(self.order))
        self.engine.advance()
        return logits

    @contextmanager
    def _prefetching(self, at: Tensor) -> Iterator[None]:
        """Prefetch for the layer after each but the first, as `EarlyQueries` does. A guess is made
        from what enters the layer too, so that its cost is in."""
        if self.guesses is None:
            yield
            return
        guesses = self.guesses.index_select(0, at)[0]
        layers = self.model.model.layers

        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            number = layer.self_attn.layer_idx
            hidden = args[0] if args else kwargs["hidden_states"]
            guessed_query(layers[number + 1], hidden, kwargs.get("position_embeddings"))
            self.engine.prefetch(number + 1, guesses[number + 1].unsqueeze(2), self.logits)

        hooks = [
            layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers[1:-1]
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
