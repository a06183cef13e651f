"""Showing a retrieved page as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from wavekv.demo.context import PlantedContext
from wavekv.model_adapters import OffloadedCache
from wavekv.offload import LayerContext

Decode = Callable[[list[int]], str]

_AROUND = 8
"""Tokens shown on either side of those in the page."""


class RetrievedPage(NamedTuple):
    """A page that a step retrieved for one KV head."""

    share: float
    """Its share of the estimated mass of all pages, mean over the head's group."""
    layer: int
    head: int
    positions: list[int]
    """Tokens in the page."""


def show_retrieved_page(
    context: PlantedContext, number: int, cache: OffloadedCache, decode: Decode
) -> None:
    """Print the page with most mass among those the last step retrieved that hold a token of fact
    `number`; of all retrieved if none does."""
    start, stop = context.fact_spans[number]
    pages = [
        page
        for layer, offloaded in enumerate(cache.offloaded_layers)
        if offloaded.context is not None
        for page in _retrieved_pages(layer, offloaded.context)
    ]
    answering = [p for p in pages if any(start <= position < stop for position in p.positions)]
    if not pages:
        return
    best = max(answering or pages)
    fact = context.facts[number]
    print(f"\n{fact.question.strip()} {fact.value}")
    print(
        f"{len(answering)} of {len(pages)} retrieved pages hold tokens of the sentence that says "
        f"so. The strongest has\n{best.share:.0%} of the paged attention of KV head {best.head} in "
        f"layer {best.layer}; its tokens are in [brackets]:"
    )
    for span in _spans(best.positions):
        print("  ..." + _marked(context.token_ids, span, set(best.positions), decode) + " ...")
    print()


def _retrieved_pages(layer: int, context: LayerContext) -> list[RetrievedPage]:
    """The pages that the last step chose for the first sequence."""
    step = context.counters.last_choice
    if step is None:
        return []
    heads = step.chosen.shape[1]
    # [Hkv, N]
    share = step.log_mass[0].softmax(-1).unflatten(0, (heads, -1)).mean(1)
    token_ids = context.paged.token_ids.view[0]
    return [
        RetrievedPage(float(share[head, index]), layer, head, sorted(_held(token_ids[head, index])))
        for head in range(heads)
        for index in step.chosen[0, head].tolist()
        if index >= 0
    ]


def _held(token_ids: torch.Tensor) -> list[int]:
    return [position for position in token_ids.tolist() if position >= 0]


def _spans(positions: list[int]) -> list[tuple[int, int]]:
    """[start, stop) stretches around the positions; those that touch are one."""
    spans: list[tuple[int, int]] = []
    for position in positions:
        start, stop = max(0, position - _AROUND), position + _AROUND + 1
        if spans and start <= spans[-1][1]:
            spans[-1] = spans[-1][0], stop
        else:
            spans.append((start, stop))
    return spans


def _marked(ids: list[int], span: tuple[int, int], inside: set[int], decode: Decode) -> str:
    words = []
    for position in range(span[0], min(span[1], len(ids))):
        word = decode([ids[position]]).replace("\n", " ")
        words.append(f"[{word.strip()}]" if position in inside else word)
    return "".join(words)
