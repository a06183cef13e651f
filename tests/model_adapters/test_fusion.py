"""Compiled parts of a model: which they are, what they compute, and that nothing stays behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import make_model, prompt
from transformers import PreTrainedModel

from wavekv.model_adapters.fusion import fused_parts


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions that were compiled, each time that one of them is called."""
    names: list[str] = []

    def recorded(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            names.append(function.__qualname__)
            return function(*args, **kwargs)

        assert options == {"dynamic": False}
        return run

    monkeypatch.setattr(torch, "compile", recorded)
    return names


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=prompt(5), use_cache=False).logits


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "phi3", "gpt2"])
def test_parts_run_compiled_while_entered(model_type: str, calls: list[str]) -> None:
    model = make_model(model_type)
    expected = logits_of(model)
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    feed_forward = [m for name, m in model.named_modules() if name.endswith(".mlp")]
    assert len(feed_forward) == model.config.num_hidden_layers
    with fused_parts(model) as number:
        assert torch.equal(logits_of(model), expected)
        assert number == len(norms) + len(feed_forward) > 0
        assert sum(name.endswith("RMSNorm.forward") for name in calls) == len(norms)
        assert sum(name.endswith("MLP.forward") for name in calls) == len(feed_forward)
        rotates = hasattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb")
        assert calls.count("apply_rotary_pos_emb") == (len(feed_forward) if rotates else 0)
    calls.clear()
    assert torch.equal(logits_of(model), expected)
    assert not calls
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_experts_is_left_alone(model_type: str, calls: list[str]) -> None:
    model = make_model(model_type)
    with fused_parts(model):
        logits_of(model)
    assert any(name.endswith("RMSNorm.forward") for name in calls)
    assert not any("Moe" in name and "RMSNorm" not in name for name in calls)


def test_all_shapes_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compiled(f, backend=backend, **options)
    )
    torch.compiler.reset()
    norm = make_model("llama").base_model.norm
    with torch.no_grad(), fused_parts(norm):
        for size in range(2, 14):
            norm(torch.ones(size, 1, norm.weight.shape[0]))
    assert len(graphs) == 12


def test_a_forward_that_somebody_put_there_stays(calls: list[str]) -> None:
    model = make_model("llama")
    norm = model.base_model.norm
    norm.forward = own = norm.forward
    with fused_parts(model):
        assert norm.forward is own
    assert norm.forward is own


def test_entered_twice(calls: list[str]) -> None:
    model = make_model("llama")
    expected = logits_of(model)
    with fused_parts(model) as outer, fused_parts(model) as inner:
        assert outer > inner == 0
        assert torch.equal(logits_of(model), expected)
    calls.clear()
    assert torch.equal(logits_of(model), expected)
    assert not calls


def test_parts_are_as_they_were_after_an_error(calls: list[str]) -> None:
    model = make_model("llama")
    file = sys.modules[type(model).__module__]
    rotate = file.apply_rotary_pos_emb
    with pytest.raises(RuntimeError, match="amid"), fused_parts(model):
        raise RuntimeError("amid")
    assert file.apply_rotary_pos_emb is rotate
    assert not any("forward" in vars(module) for module in model.modules())
