"""Contexts that are cropped, dropped, or changed in inference mode: what they hold afterwards."""

from __future__ import annotations

import pytest
import torch
from context_checks import HEADS, Pair, check_pages, check_tokens
from offload_cases import D, Tokens, feed, new_context, plain_attention


@pytest.mark.parametrize("pad", [20, 23, 40])
def test_sinks_that_come_from_the_window_are_cropped_with_it(device, pad: int) -> None:
    """Padding that outlasts the first segment: the sinks of that row are its latest tokens."""
    tokens = Tokens.random(2, HEADS, 60)
    tokens.valid[1, :pad] = False
    context = new_context(tokens, device, budget=1.0, num_sink_tokens=4)
    for start in range(24):
        feed(context, tokens.between(start, start + 1))
    context.settle()
    assert context.steady.start == 16
    pair = Pair(context, tokens.between(0, 24), [0, pad])
    check_tokens(pair)
    context.truncate(22)
    pair.tokens = tokens.between(0, 22)
    check_tokens(pair)
    new = Tokens.random(2, HEADS, 30)
    query, out = feed(context, new)
    every = pair.tokens.then(new)
    exact = plain_attention(query, every.keys, every.values, every.valid, scale=D**-0.5)
    torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [0, 15, 16, 40, 128, 134, 160, 270])
def test_a_crop_inside_a_span_takes_its_scatter_along(device, length: int) -> None:
    """Spans of 128 tokens, filled by segments of 16: a crop cuts them anywhere."""
    tokens = Tokens.random(2, HEADS, 310)
    tokens.valid[1, :5] = False
    context = new_context(tokens, device)
    for start in range(0, 280, 20):
        feed(context, tokens.between(start, start + 20))
    context.settle()
    assert context.paged.num_tokens >= 256
    context.truncate(length)
    check_pages(context)
    feed(context, tokens.between(length, length + 30))
    context.settle()
    check_pages(context)


def test_a_crop_without_padding_leaves_no_mask_behind(device: torch.device) -> None:
    tokens = Tokens.random(1, HEADS, 100)
    context = new_context(tokens, device)
    for start in range(0, 100, 5):
        feed(context, tokens.between(start, start + 5))
    context.truncate(30)
    feed(context, tokens.between(30, 100))
    context.settle()
    assert context.steady.mask is None


def test_a_context_dropped_while_its_pages_are_built_frees_them(device: torch.device) -> None:
    tokens = Tokens.random(1, HEADS, 80)
    context = new_context(tokens, device)
    fork = context.fork(context.runtime.fork(context.runtime.config))
    feed(fork, tokens)
    assert fork._pending is not None
    assert context.paged.arena.num_pages > 0
    del fork
    assert context.paged.arena.num_pages == 0
    context.paged.arena.check_integrity()
    feed(context, tokens)
    context.settle()
    check_tokens(Pair(context, tokens, [0]))


def test_changes_made_in_inference_mode_can_be_changed_outside_it(device: torch.device) -> None:
    tokens = Tokens.random(2, HEADS, 80)
    with torch.inference_mode():
        context = new_context(tokens, device)
        feed(context, tokens.between(0, 60))
    feed(context, tokens.between(60, 80))
    with torch.inference_mode():
        context.truncate(50)
    context.select(torch.tensor([1, 1]))
    check_tokens(Pair(context, tokens.between(0, 50).select(torch.tensor([1, 1])), [0, 0]))
