"""Tiny random models of every family the tests cover, and what each is expected to do.

`FAMILIES` is the matrix: `test_families.py` runs it and `support_table.py` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from wavekv import OffloadConfig

VOCAB, PAD = 101, 0
WINDOW, CHUNK = 16, 32
"""Sliding window and attention chunk of the hybrid models: shorter than any prompt here."""

TINY = OffloadConfig(
    budget=1.0, page_size=4, append_segment=16, segment=64, window=8, num_sink_tokens=4
)
"""Everything is retrieved, and prompts of a hundred tokens have pages and whole segments."""

SCENARIOS = {
    "padded": "left-padded batch",
    "chunked": "chunked prefill",
    "padded_chunked": "padded batch in chunks",
    "beams": "beam search",
    "two_turns": "second turn",
    "two_turns_chunked": "second turn in chunks",
    "prompt_lookup": "prompt lookup",
}
"""What every family is tested in, and its heading in the table of support."""


@dataclass(frozen=True)
class Family:
    """One `model_type`."""

    model_type: str
    layers: str
    """What its layers attend to; the first kind is offloaded."""
    options: dict[str, Any]
    """On top of `_COMMON`."""
    unsupported: dict[str, str] = field(default_factory=dict)
    """Scenarios that transformers itself refuses for this family, and its reason."""


_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}
_FULL = "full"
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
_WINDOWED = {**_SLIDING, "sliding_window": WINDOW}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LINEAR = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "shared_expert_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_STATEFUL = {"prompt_lookup": "assisted generation is not supported with stateful models"}

FAMILIES = (
    Family("llama", _FULL, {}),
    Family("qwen2", _FULL, {}),
    Family("qwen3", _FULL, {}),
    Family("qwen3_moe", _FULL, {**_EXPERTS, "decoder_sparse_step": 1}),
    Family("mistral", _FULL, {"sliding_window": None}),
    Family("phi3", _FULL, {"sliding_window": None}),
    Family("olmo2", _FULL, {}),
    Family("glm4", _FULL, {}),
    Family("gemma", _FULL, {}),
    Family("mixtral", _FULL, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Family("smollm3", _FULL, {}),
    Family("granite", _FULL, {}),
    Family("starcoder2", _FULL, {}),
    Family("glm4_moe", _FULL, {**_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1}),
    Family("ernie4_5", _FULL, {}),
    Family("seed_oss", _FULL, {}),
    Family("gpt_neox", _FULL, {}),
    Family("gpt2", _FULL, {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 4096}),
    Family(
        "llama4_text",
        "full and chunked",
        {
            "num_hidden_layers": 4,
            "layer_types": ["chunked_attention", "full_attention"] * 2,
            "no_rope_layers": [1, 0, 1, 0],
            "attention_chunk_size": CHUNK,
            "intermediate_size_mlp": 64,
            "num_local_experts": 2,
            "interleave_moe_layer_step": 2,
            "attn_temperature_tuning": True,
            "floor_scale": 64,
        },
    ),
    Family("cohere2", "full and sliding", {**_WINDOWED, "logit_scale": 1.0}),
    Family("gemma2", "full and sliding", {**_WINDOWED, "query_pre_attn_scalar": 16}),
    Family("gemma3_text", "full and sliding", {**_WINDOWED, "query_pre_attn_scalar": 16}),
    Family("olmo3", "full and sliding", _WINDOWED),
    Family("exaone4", "full and sliding", _WINDOWED),
    Family(
        "gemma4_text",
        "full and sliding, without shared keys",
        {
            **_WINDOWED,
            "num_kv_shared_layers": 0,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
        },
    ),
    Family(
        "gpt_oss",
        "full and sliding, with sinks",
        {**_WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    Family("qwen3_next", "full and linear", {**_LINEAR, **_EXPERTS}, _STATEFUL),
    Family("qwen3_5_text", "full and linear", _LINEAR, _STATEFUL),
)
BY_TYPE = {family.model_type: family for family in FAMILIES}
EVERY_KIND = ["llama", "gpt2", "gemma3_text", "llama4_text", "qwen3_next"]
"""One family for each kind of layer that wavekv leaves alone, and one with absolute positions."""


def make_model(model_type: str, attention: str = "eager", **changes: Any) -> PreTrainedModel:
    """A new model of a family, the same weights each time, in evaluation mode."""
    options = {**_COMMON, **BY_TYPE[model_type].options, **changes}
    return build(AutoConfig.for_model(model_type, **options), attention)


def build(config: Any, attention: str = "eager") -> PreTrainedModel:
    """A model of any config, weights drawn from a fixed seed."""
    torch.manual_seed(17)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.eval().requires_grad_(False)


@cache
def eager_model(model_type: str) -> PreTrainedModel:
    """The reference, shared by all tests: leave it as it is."""
    return make_model(model_type)


def prompt(length: int, seed: int = 0, batch: int = 1) -> Tensor:
    """Random token ids [batch, length] without padding; the last third repeats the first."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (batch, length), generator=generator)
    third = length // 3
    ids[:, length - third :] = ids[:, :third]
    return ids


def left_padded(*lengths: int) -> tuple[Tensor, Tensor]:
    """Prompts of several lengths as (ids, attention mask), padded on the left."""
    longest = max(lengths)
    ids = torch.full((len(lengths), longest), PAD)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = prompt(length, seed=row + 1)[0]
    return ids, (ids != PAD).long()
