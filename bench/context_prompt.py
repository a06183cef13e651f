"""A prompt and the model that reads it, for the parts that need a cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from decode_model import SHAPES, decoder_config, random_decoder, release_memory
from torch import Tensor
from transformers import PreTrainedModel

from wavekv import OffloadConfig, OffloadedCache, OffloadedKV
from wavekv.demo.context import PlantedContext, plant
from wavekv.model_adapters.bundled import load_demo_model, load_demo_tokenizer
from wavekv.model_adapters.prefill_plan import plan_prefill

BUNDLED = "bundled"
SHAPE_NAMES = (BUNDLED, *SHAPES)


@dataclass
class Prompt:
    """Tokens of one sequence, and the model."""

    model: PreTrainedModel
    ids: Tensor
    """[1, T]"""
    context: PlantedContext | None
    """The facts in it, where the model is the bundled one."""
    prefill_seconds: list[float] = field(default_factory=list)
    """Of every prefill, until the token behind the prompt is known."""

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return self.model.device

    def wrapped(self, **settings: Any) -> OffloadedKV:
        """The model with such settings of the cache."""
        return OffloadedKV(self.model, OffloadConfig(**settings))

    def prefill(self, wrapped: OffloadedKV) -> tuple[OffloadedCache, Tensor, float]:
        """A cache of the prompt, the token [1, 1] that follows it, and the seconds it took."""
        if not self.prefill_seconds:
            chunk = plan_prefill(self.model, wrapped.new_cache(), 1, self.ids.shape[1]).chunk
            wrapped.prefill(self.ids[:, :chunk], wrapped.new_cache())
            release_memory()
        cache = wrapped.new_cache()
        began = time.perf_counter()
        logits = wrapped.prefill(self.ids, cache, progress=True)
        token = logits.argmax(-1, keepdim=True)
        # waits for the device
        token.tolist()
        self.prefill_seconds.append(time.perf_counter() - began)
        cache.settle()
        return cache, token, self.prefill_seconds[-1]


@lru_cache(maxsize=1)
def make_prompt(shape: str, layers: int | None, device: str, tokens: int, seed: int) -> Prompt:
    """A model and so many tokens for it; the same again while no other is asked for."""
    model = make_model(shape, layers, device, seed)
    if shape == BUNDLED:
        context = planted(tokens, seed)
        return Prompt(model, torch.tensor([context.token_ids], device=device), context)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=generator)
    return Prompt(model, ids.to(device), None)


def make_model(shape: str, layers: int | None, device: str, seed: int) -> PreTrainedModel:
    """The bundled model, or one with random weights."""
    if shape == BUNDLED:
        return load_demo_model().to(device)
    on_cuda = torch.device(device).type == "cuda"
    dtype = torch.bfloat16 if on_cuda else torch.float32
    return random_decoder(decoder_config(shape, layers), device, dtype, seed)


def planted(tokens: int, seed: int) -> PlantedContext:
    """Text with facts in it, in tokens of the bundled model."""
    encode: Callable[..., Any] = load_demo_tokenizer().encode_batch
    return plant(tokens, lambda strings: [e.ids for e in encode(strings)], seed=seed)


@torch.no_grad()
def next_token(wrapped: OffloadedKV, cache: OffloadedCache, token: Tensor) -> Tensor:
    """The token [1, 1] behind `token`, which the cache takes in."""
    logits = wrapped(input_ids=token, past_key_values=cache, logits_to_keep=1).logits
    return logits[:, -1].argmax(-1, keepdim=True)
