"""Keys, values and queries of the bundled model over a long text, as its attention saw them.

The model prefills a text with planted facts (exact attention), then answers questions about them;
queries are those of the answer tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wavekv import OffloadConfig, OffloadedKV
from wavekv.cli.answering import VALUE_DIGITS
from wavekv.demo.context import plant
from wavekv.model_adapters.bundled import load_demo_model, load_demo_tokenizer
from wavekv.offload.paged import PagedZone
from wavekv.offload.steady import SteadyZone


@dataclass(frozen=True, slots=True)
class Captured:
    """L layers; keys after rotary embedding."""

    keys: Tensor
    """[L, Hkv, T, D]"""
    values: Tensor
    """[L, Hkv, T, D]"""
    queries: Tensor
    """[L, Hkv, G, Q, D], unscaled, one for each answer token."""


@torch.inference_mode()
def capture(num_tokens: int = 32768, questions: int = 16, seed: int = 100) -> Captured:
    """Run the bundled model over `num_tokens` tokens and ask so many questions."""
    tokenizer = load_demo_tokenizer()
    context = plant(
        num_tokens,
        lambda strings: [encoding.ids for encoding in tokenizer.encode_batch(strings)],
        seed=seed,
    )
    with OffloadedKV(load_demo_model(), OffloadConfig(mode="exact")) as model:
        cache = model.new_cache()
        model.prefill(torch.tensor([context.token_ids]), cache, progress=True)
        zones = [(layer.context.steady, layer.context.paged) for layer in cache.offloaded_layers]
        keys, values = (
            torch.stack([_in_order(*zone, half)[:, :num_tokens] for zone in zones])
            for half in range(2)
        )
        queries = []
        for fact in context.facts[:questions]:
            fork = cache.fork()
            ids = torch.tensor([tokenizer.encode(fact.question).ids])
            model(input_ids=ids[:, :-1], past_key_values=fork, logits_to_keep=1)
            token = ids[:, -1:]
            for _ in range(VALUE_DIGITS):
                logits = model(input_ids=token, past_key_values=fork, logits_to_keep=1).logits
                token = logits[:, -1].argmax(-1, keepdim=True)
                step = [layer.context.counters.last_query for layer in fork.offloaded_layers]
                queries.append(torch.cat(step))
    heads = keys.shape[1]
    # [Q, L, Hq, D] -> [L, Hkv, G, Q, D]
    stacked = torch.stack(queries, dim=2).unflatten(1, (heads, -1))
    return Captured(keys, values, stacked)


def _in_order(steady: SteadyZone, paged: PagedZone, half: int) -> Tensor:
    """[Hkv, T, D] keys (half 0) or values (half 1) of one layer, by position."""
    tokens = paged.recover(0, paged.num_tokens)[half]
    rest = (steady.keys, steady.values)[half].view
    sinks = steady.num_sink_slots
    # pages have no slot for the sink tokens, which the steady zone holds first
    tokens[:, :, steady.sink_positions[0]] = rest[:, :, :sinks]
    return torch.cat([tokens, rest[:, :, sinks:]], 2)[0]
