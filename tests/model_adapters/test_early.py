"""Guessed queries: exactly a layer's own where nothing lies between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import make_model, prompt
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from wavekv.model_adapters.early import guessed_query


def queries_and_inputs(model: PreTrainedModel) -> tuple[list[Tensor], list[tuple[Any, Any]]]:
    """The query that each layer attends with, and what entered it: hidden states, rotation."""
    queries: list[Tensor] = []
    inputs: list[tuple[Any, Any]] = []

    def record(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        queries.append(query)
        return torch.zeros_like(query).transpose(1, 2), None

    def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        inputs.append((hidden, kwargs["position_embeddings"]))

    AttentionInterface.register("recorded", record)
    model.set_attn_implementation("recorded")
    hooks = [
        layer.register_forward_pre_hook(enter, with_kwargs=True)
        for layer in model.base_model.layers
    ]
    with torch.no_grad():
        model(input_ids=prompt(5, batch=2), use_cache=False)
    for hook in hooks:
        hook.remove()
    return queries, inputs


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_own_input_gives_own_query(model_type: str) -> None:
    model = make_model(model_type)
    queries, inputs = queries_and_inputs(model)
    assert len(queries) == len(inputs) == len(model.base_model.layers)
    for layer, query, (hidden, rotation) in zip(
        model.base_model.layers, queries, inputs, strict=True
    ):
        with torch.no_grad():
            torch.testing.assert_close(guessed_query(layer, hidden, rotation), query)


def test_one_layer_early_is_a_guess() -> None:
    model = make_model("llama")
    queries, inputs = queries_and_inputs(model)
    with torch.no_grad():
        guess = guessed_query(model.base_model.layers[2], *inputs[1])
    cosine = torch.cosine_similarity(guess, queries[2], dim=-1).mean()
    assert 0.3 < float(cosine) < 0.9999
