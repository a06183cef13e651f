"""Which model, and which tokenizer, a saved context belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from wavekv.errors import ContextMismatchError

_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "layer_types",
    "sliding_window",
    "rope_parameters",
    "max_position_embeddings",
)
"""Of a text configuration: what keys and values depend on beside the weights."""
_SAMPLES = 16
"""Numbers of each weight that the digest is of."""


def model_fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """What identifies a model, as JSON holds it: fields of its configuration, its dtype, and a
    digest of 16 numbers from each weight (weights that are elsewhere, on "meta", left out).

    Cost: one pass over the list of weights and a copy of some thousand numbers.
    """
    text = model.config.get_text_config(decoder=True)
    fields = {name: getattr(text, name, None) for name in _FIELDS}
    fields["dtype"] = str(model.dtype).removeprefix("torch.")
    fields["weights"] = _weights_digest(model)
    # as it comes back from a file
    plain: dict[str, Any] = json.loads(json.dumps(fields, sort_keys=True, default=str))
    return plain


def check_model(saved: Mapping[str, Any], model: PreTrainedModel, path: str) -> None:
    """Raise ContextMismatchError, which names the first field that differs, unless a context with
    this fingerprint is of `model`."""
    own = model_fingerprint(model)
    # what says most first
    for name in (*_FIELDS, "dtype", "weights"):
        expected = own[name]
        if saved.get(name) != expected:
            advice = "load it with the model that made it, or prefill again"
            if name == "weights":
                advice = f"same shape but other weights; {advice}"
            raise ContextMismatchError(
                f"expected {path} to be of this model, with {name}={expected!r}, got "
                f"{saved.get(name)!r}: {advice}"
            )


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of what a tokenizer does: of its `backend_tokenizer`, a `tokenizers.Tokenizer`, or
    of its vocabulary where it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(backend, "to_str"):
        text = backend.to_str()
    else:
        text = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


def check_tokenizer(saved: str | None, tokenizer: Any, path: str) -> None:
    """Raise ContextMismatchError unless a context with this digest was tokenized alike. Nothing is
    known of a context that was saved without a tokenizer."""
    if saved is None or tokenizer is None:
        return
    own = tokenizer_digest(tokenizer)
    if saved != own:
        raise ContextMismatchError(
            f"expected {path} to be of this tokenizer, with tokenizer={own[:16]}..., got "
            f"{saved[:16]}...: its tokens mean something else; use the tokenizer it was saved with"
        )


def _weights_digest(model: PreTrainedModel) -> str:
    weights = sorted(model.state_dict().items())
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
    samples = [_sample(weight) for _, weight in weights if weight.numel() and not weight.is_meta]
    numbers = torch.empty(len(samples), _SAMPLES, dtype=torch.float64)
    for device in {sample.device for sample in samples}:
        # one copy from each device
        rows = [row for row, sample in enumerate(samples) if sample.device == device]
        numbers[rows] = torch.stack([samples[row] for row in rows]).cpu()
    digest.update(numbers.numpy().tobytes())
    return digest.hexdigest()


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """[_SAMPLES] float64, which holds exactly whatever a weight is made of."""
    flat = weight.detach().flatten()
    # a slice is one operation of the device, and there are hundreds of weights
    sample = flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES].double()
    return torch.nn.functional.pad(sample, (0, _SAMPLES - len(sample)))
