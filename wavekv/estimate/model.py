"""The shape of a decoder: what a Hugging Face config.json says of layers, heads and weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wavekv.errors import ConfigError, UnsupportedModelError
from wavekv.estimate.builtin import BUILTIN

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_WITHOUT_GATE = ("gpt2", "gpt_neox", "gptj", "opt", "phi", "starcoder2", "falcon", "bloom", "mpt")
"""Model types whose feed-forward blocks are two matrices, not three."""
_OTHER_NAMES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What sizes and times depend on."""

    name: str
    layers: int
    """All of them."""
    offloaded: int
    """Layers with full attention: those whose tokens are offloaded."""
    sliding_window: int
    """Tokens that each other layer keeps."""
    hidden: int
    intermediate: int
    """Of all experts that a token uses."""
    q_heads: int
    kv_heads: int
    head_dim: int
    parameters: int
    """Without biases and norms, which are some thousandths."""
    embedding: int
    """Parameters of them that a step reads no more than a row of."""
    idle: int
    """Parameters of them in experts that a token does not use."""
    head: int
    """Parameters of the language-model head."""
    dtype: torch.dtype
    """That of the config."""

    @property
    def step_parameters(self) -> int:
        """Parameters that a decode step of one sequence reads."""
        return self.parameters - self.embedding - self.idle


def read_model(text: str) -> ModelShape:
    """The shape of a built-in name, a config.json, or a folder with one.

    Raises:
        ConfigError: there is none, or it lacks a number.
        UnsupportedModelError: wavekv does not offload such a model.
    """
    if text in BUILTIN:
        return model_shape(text, BUILTIN[text])
    path = Path(text)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"expected a config.json, a folder with one, or one of {', '.join(BUILTIN)}, got "
            f"{text!r}, which is none of them; nothing is downloaded"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"expected JSON in {path}, got {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"expected an object in {path}, got {type(fields).__name__}")
    name = fields.get("_name_or_path") or path.resolve().parent.name
    return model_shape(str(name), fields)


def model_shape(name: str, fields: Mapping[str, Any]) -> ModelShape:
    """The shape that the fields of a config describe.

    Raises:
        ConfigError, UnsupportedModelError: as `read_model`.
    """
    outer = fields
    fields = fields.get("text_config") or fields
    kind = fields.get("model_type", outer.get("model_type", ""))
    if outer.get("is_encoder_decoder") or fields.get("kv_lora_rank"):
        raise UnsupportedModelError(
            f"expected a decoder that caches keys as attention sees them, got {kind!r}: "
            "encoder-decoders and latent attention (MLA) are not supported"
        )
    hidden, layers, q_heads = (
        _number(name, fields, key)
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    head_dim = fields.get("head_dim") or hidden // q_heads
    kv_heads = 1 if fields.get("multi_query") else fields.get("num_key_value_heads") or q_heads
    experts, used, feed_forward = _feed_forward(name, kind, fields, hidden)
    vocabulary = _number(name, fields, "vocab_size")
    embedding = vocabulary * hidden
    attention = hidden * head_dim * (2 * q_heads + 2 * kv_heads)
    tied = fields.get("tie_word_embeddings", outer.get("tie_word_embeddings", kind in ("gpt2",)))
    offloaded, window = _full_layers(name, fields, layers)
    return ModelShape(
        name=name,
        layers=layers,
        offloaded=offloaded,
        sliding_window=window,
        hidden=hidden,
        intermediate=feed_forward * used // hidden,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        parameters=layers * (attention + experts * feed_forward) + embedding * (1 if tied else 2),
        # one that is the head too is read whole
        embedding=0 if tied else embedding,
        idle=layers * (experts - used) * feed_forward,
        head=embedding,
        dtype=_DTYPES.get(str(fields.get("dtype") or fields.get("torch_dtype")), torch.bfloat16),
    )


def dtype_of(name: str) -> torch.dtype:
    """The type of weights and keys of that name.

    Raises:
        ConfigError: another name.
    """
    if name not in _DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]


def _feed_forward(
    name: str, kind: str, fields: Mapping[str, Any], hidden: int
) -> tuple[int, int, int]:
    """(experts, experts that a token uses, parameters of one): of a plain block (1, 1, all)."""
    matrices = 2 if kind in _WITHOUT_GATE else 3
    experts = fields.get("num_local_experts") or fields.get("num_experts") or 1
    used = fields.get("num_experts_per_tok") or 1
    width = fields.get("moe_intermediate_size") if experts > 1 else None
    if width is None:
        default = 4 * hidden if kind in _WITHOUT_GATE else None
        width = _number(name, fields, "intermediate_size", default)
    return experts, min(used, experts), matrices * hidden * int(width)


def _full_layers(name: str, fields: Mapping[str, Any], layers: int) -> tuple[int, int]:
    """(layers with full attention, window of the others)."""
    kinds = fields.get("layer_types")
    window = int(fields.get("sliding_window") or fields.get("attention_chunk_size") or 0)
    if kinds is None:
        is_sliding = window > 0 and fields.get("use_sliding_window", True)
        kinds = ["sliding_attention" if is_sliding else "full_attention"] * layers
    full = sum(each == "full_attention" for each in kinds)
    if full == 0:
        raise UnsupportedModelError(
            f"expected a model with full-attention layers, {name} has only "
            f"{', '.join(sorted(set(kinds)))}: there is nothing to offload"
        )
    return full, window


def _number(name: str, fields: Mapping[str, Any], key: str, default: int | None = None) -> int:
    for other in (key, *_OTHER_NAMES.get(key, ())):
        value = fields.get(other)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    if default is None:
        raise ConfigError(
            f"expected a whole number {key!r} in the config of {name}, got {fields.get(key)!r}; "
            "give the config.json of a decoder"
        )
    return default
