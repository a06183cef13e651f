"""Shapes of models from their config, against transformers' own models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from wavekv.errors import ConfigError, UnsupportedModelError
from wavekv.estimate.builtin import BUILTIN
from wavekv.estimate.model import dtype_of, model_shape, read_model

SMALL = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
CASES = {
    "llama": SMALL | {"tie_word_embeddings": False},
    "qwen3": SMALL | {"tie_word_embeddings": True},
    "mixtral": SMALL
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
    "qwen3_moe": SMALL
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "tie_word_embeddings": False,
    },
    "gpt2": {"vocab_size": 1000, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 8},
}


@pytest.mark.parametrize("kind", CASES)
def test_parameters_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(kind, **CASES[kind])
    config.save_pretrained(tmp_path)
    shape = read_model(str(tmp_path))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    matrices = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if weight.ndim > 1 and not name.endswith(("wpe.weight", "gate.weight", "router.weight"))
    )
    assert shape.parameters == matrices
    text = config.get_text_config()
    assert shape.layers == shape.offloaded == text.num_hidden_layers
    assert shape.q_heads == text.num_attention_heads
    assert shape.head_dim * shape.q_heads in (128, 64)


def test_what_a_step_reads() -> None:
    tied = model_shape("a", SMALL | {"tie_word_embeddings": True})
    untied = model_shape("a", SMALL | {"tie_word_embeddings": False})
    assert untied.parameters - tied.parameters == 64_000
    assert tied.step_parameters == tied.parameters == untied.step_parameters
    experts = model_shape("a", CASES["mixtral"])
    assert experts.idle == 3 * 2 * 3 * 64 * 96
    assert experts.step_parameters == experts.parameters - experts.idle - 64_000
    assert experts.intermediate == 2 * 3 * 96


def test_built_in_shapes_are_known_models() -> None:
    billions = {
        name: model_shape(name, fields).parameters / 1e9 for name, fields in BUILTIN.items()
    }
    # as published, without norms and biases
    expected = {"llama-3.1-8b": 8.030, "llama-3.2-1b": 1.236, "qwen2.5-7b": 7.615}
    assert billions == pytest.approx(expected, rel=1e-3)


def test_layers_with_windows_are_not_offloaded() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    shape = model_shape("a", SMALL | {"layer_types": kinds, "sliding_window": 512})
    assert (shape.offloaded, shape.sliding_window) == (1, 512)
    with pytest.raises(UnsupportedModelError, match="nothing to offload"):
        model_shape("a", SMALL | {"sliding_window": 512})
    assert model_shape("a", SMALL | {"sliding_window": 512, "use_sliding_window": False}).offloaded


def test_the_text_part_of_a_config_counts() -> None:
    outer = {"model_type": "llava", "text_config": SMALL | {"dtype": "float16"}}
    shape = model_shape("a", outer)
    assert (shape.hidden, shape.dtype) == (64, torch.float16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "'hidden_size' in the config of here"),
        ({"hidden_size": "64"}, "'hidden_size' in the config of here, got '64'"),
        (SMALL | {"vocab_size": 0}, "'vocab_size'"),
        (SMALL | {"kv_lora_rank": 8}, "MLA"),
        (SMALL | {"is_encoder_decoder": True}, "encoder-decoders"),
    ],
)
def test_what_is_wrong_is_named(fields: dict, message: str) -> None:
    with pytest.raises((ConfigError, UnsupportedModelError), match=message):
        model_shape("here", fields)


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"one of llama-3.1-8b.*nothing is downloaded"):
        read_model("meta-llama/Llama-3.1-8B")
    with pytest.raises(ConfigError, match="is none of them"):
        read_model(str(tmp_path))
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match="expected JSON in"):
        read_model(str(path))
    path.write_text("[1]")
    with pytest.raises(ConfigError, match=r"expected an object in .*, got list"):
        read_model(str(path))
    path.write_text(json.dumps(SMALL))
    assert read_model(str(path)).name == tmp_path.name


def test_names_of_types() -> None:
    assert dtype_of("bfloat16") is torch.bfloat16
    with pytest.raises(ConfigError, match=r"dtype must be one of float32.*got 'int3'"):
        dtype_of("int3")
