"""The query of the next layer, guessed one layer early from what enters this one.

The residual stream changes little in a layer, so the next layer's norm, query projection and rotary
embedding give nearly its query while this layer still runs (InfiniGen, OSDI 2024, section 4.3,
which does so with a part of the weights). Pages that it would choose are fetched meanwhile.
"""

from __future__ import annotations

import logging
import sys
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wavekv.offload import Logits
from wavekv.offload.engine import DecodeEngine

_LOG = logging.getLogger("wavekv")


class EarlyQueries:
    """While entered, the forward of `model` hands guessed queries to `engine.prefetch`."""

    def __init__(self, model: PreTrainedModel, engine: DecodeEngine) -> None:
        self._engine = engine
        self._layers: list[Any] = []
        self._hooks: list[Any] = []
        self._own: dict[int, Tensor] = {}
        if engine.config.prefetch == "early":
            self._layers = list(getattr(model.base_model, "layers", []))
            if not self._layers or not all(map(_is_plain, self._layers)):
                self._give_up("the layers of this model are not known")

    def __enter__(self) -> EarlyQueries:
        self._hooks = [
            layer.register_forward_pre_hook(self._hook(number), with_kwargs=True)
            for number, layer in enumerate(self._layers)
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def check(self) -> None:
        """Give up if a layer's query, computed so from what enters it, is not its query."""
        for number, own in self._own.items():
            seen = self._engine.last_queries.get(number)
            if seen is None or not torch.allclose(own[:, :, 0], seen, rtol=2e-2, atol=2e-2):
                self._give_up(f"the queries of {type(self._layers[number]).__name__} are not plain")
                return
        self._own = {}

    def _give_up(self, reason: str) -> None:
        _LOG.warning("no early prefetch: %s", reason)
        self._layers, self._own = [], {}
        self.__exit__(None, None, None)

    def _hook(self, number: int) -> Any:
        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            rotation = kwargs.get("position_embeddings")
            if not torch.cuda.is_current_stream_capturing():
                self._own[number] = guessed_query(layer, hidden, rotation)
            # what enters the first layer is the bare embedding, and tells nothing of the next
            if 0 < number < len(self._layers) - 1:
                following = self._layers[number + 1]
                query = guessed_query(following, hidden, rotation)
                scale = float(following.self_attn.scaling)
                self._engine.prefetch(number + 1, query, Logits(scale))

        return before


def _is_plain(layer: Any) -> bool:
    attention = getattr(layer, "self_attn", None)
    return (
        hasattr(layer, "input_layernorm")
        and hasattr(attention, "q_proj")
        and hasattr(sys.modules[type(layer).__module__], "apply_rotary_pos_emb")
    )


def guessed_query(layer: Any, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
    """The query [B, Hq, T, D] that `layer` makes of `hidden` [B, T, hidden size]."""
    attention = layer.self_attn
    query = attention.q_proj(layer.input_layernorm(hidden))
    query = query.unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, "q_norm"):
        query = attention.q_norm(query)
    query = query.transpose(1, 2)
    if rotation is not None:
        rotate = sys.modules[type(layer).__module__].apply_rotary_pos_emb
        query = rotate(query, query, *rotation)[0]
    guess: Tensor = query
    return guess
