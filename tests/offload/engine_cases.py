"""What the tests of the engine share: contexts of a few layers, and their steps taken two ways."""

from __future__ import annotations

import torch
from offload_cases import SMALL, D
from torch import Tensor

from wavekv.config import OffloadConfig
from wavekv.offload import LayerContext, Logits, OffloadRuntime
from wavekv.offload.engine import DecodeEngine

LOGITS = Logits(D**-0.5)
HQ, HKV, LAYERS = 4, 2, 2


class Steps:
    """Random tokens for a stack of layers."""

    def __init__(self, seed: int, batch: int = 1) -> None:
        self.random, self.batch = torch.Generator().manual_seed(seed), batch

    def draw(self, heads: int, tokens: int = 1) -> Tensor:
        return torch.randn(self.batch, heads, tokens, D, generator=self.random)

    def token(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [(self.draw(HQ), self.draw(HKV), self.draw(HKV)) for _ in range(LAYERS)]


def prefilled(steps: Steps, length: int, padding: int = 0, **chosen: object) -> list[LayerContext]:
    """Contexts of `length` tokens; the first `padding` of the first sequence are none."""
    runtime = OffloadRuntime(OffloadConfig(**(SMALL | chosen)))  # type: ignore[arg-type]
    valid = None
    if padding:
        valid = torch.ones(steps.batch, length, dtype=torch.bool)
        valid[0, :padding] = False
    contexts = []
    for _ in range(LAYERS):
        q, k, v = (steps.draw(heads, length) for heads in (HQ, HKV, HKV))
        context = LayerContext(runtime, k, v)
        runtime.is_prefilling = True
        context.attend(q, k, v, valid, LOGITS)
        runtime.is_prefilling = False
        context.page_out()
        contexts.append(context)
    return contexts


def eager_step(
    contexts: list[LayerContext], token: list[tuple[Tensor, Tensor, Tensor]]
) -> list[Tensor]:
    return [
        context.attend(*each, None, LOGITS) for context, each in zip(contexts, token, strict=True)
    ]


def engine_step(engine: DecodeEngine, token: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    engine.before_step()
    outs = [engine.attend(i, *each, LOGITS, None).clone() for i, each in enumerate(token)]
    engine.advance()
    engine.after_step()
    engine.check_integrity()
    return outs


def forked(contexts: list[LayerContext]) -> list[LayerContext]:
    runtime = contexts[0].runtime.fork(contexts[0].runtime.config)
    return [context.fork(runtime) for context in contexts]


def started(
    steps: Steps, length: int, padding: int = 0, **chosen: object
) -> tuple[list[LayerContext], list[LayerContext]]:
    """The same contexts twice, with a decode step behind them."""
    contexts = prefilled(steps, length, padding, **chosen)
    eager_step(contexts, steps.token())
    copies = forked(contexts)
    for copy, context in zip(copies, contexts, strict=True):
        context.settle()
        copy.counters.last_query = context.counters.last_query
    return contexts, copies
