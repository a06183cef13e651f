"""The bundled demo model: a 10.7M-parameter Llama that answers questions about planted facts.

Trained by bench/train_demo_model.py; weights are int8 rows, about 11 MB.
"""

from __future__ import annotations

import json
from importlib.resources import files

import torch
from safetensors.torch import load
from tokenizers import Tokenizer
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from wavekv.model_adapters.quantised import restore_rows

_ASSETS = files("wavekv.demo") / "assets"


def load_demo_model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Return the demo model in evaluation mode, on the CPU."""
    config = LlamaConfig(**json.loads((_ASSETS / "config.json").read_text()))
    model = LlamaForCausalLM(config)
    model.load_state_dict(
        restore_rows(load((_ASSETS / "model.safetensors").read_bytes())), strict=False
    )
    model.tie_weights()
    model.generation_config.pad_token_id = config.pad_token_id
    return model.to(dtype).eval().requires_grad_(False)


def load_demo_tokenizer() -> Tokenizer:
    """Return the demo model's tokenizer (of the `tokenizers` library)."""
    return Tokenizer.from_str((_ASSETS / "tokenizer.json").read_text())


def full_attention_cache(model: LlamaForCausalLM) -> DynamicCache:
    """Transformers' own cache, for comparison: every token stays where the model is."""
    return DynamicCache(config=model.config)
