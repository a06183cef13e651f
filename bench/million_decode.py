"""Decoding with a million tokens of an 8B model in host memory: filled contexts, every layer with
pages of its own."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from functools import partial

import torch
from comparison import attempted, share_or_size
from decode_baselines import full_attention, start_peak
from decode_figures import engine_bytes
from decode_fill import FilledContexts, fill_contexts, say
from decode_model import release_memory
from decode_ours import exact_steps, offload_config, retrieval_steps, walks
from decode_result import Result
from decode_steps import WalkedSteps
from decode_walk import QUERY_SCALE
from exact_layer import exact_layer
from needles import Needles, draw_needles, figures, page_of
from torch import Tensor
from transformers import LlamaForCausalLM

from wavekv.index import relative_error
from wavekv.model_adapters.cache import OffloadedCache
from wavekv.offload import OffloadRuntime

SAMPLED_LAYERS = 3
SAMPLED_STEPS = 2


def add_flags(parser: ArgumentParser) -> None:
    """The flags of this part."""
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.02, 0.01, 0.005])
    parser.add_argument(
        "--device-budgets",
        type=share_or_size,
        nargs="+",
        default=[0.9, "26GiB"],
        help="of which the first has all",
    )
    parser.add_argument("--prefetches", nargs="+", default=["none", "runners-up"])
    parser.add_argument("--exact", action="store_true", help="time a step that streams all pages")


def decode_rows(args: Namespace, model: LlamaForCausalLM, tokens: int) -> Iterator[Result]:
    """A result for each budget and prefetch, the first with its checks; then the baselines."""
    runtime = OffloadRuntime(offload_config(args))
    config = model.config
    needles = draw_needles(
        0,
        tokens - 2 * runtime.config.append_segment - runtime.config.window,
        config.num_hidden_layers,
        config.num_key_value_heads,
        config.head_dim,
        length=config.head_dim**0.5,
        seed=args.seed,
    )
    filled = fill_contexts(
        model, runtime, tokens, 1, host_layers=args.host_layers, seed=args.seed, needles=needles
    )
    release_memory()
    first, *others = args.device_budgets
    runs = [(budget, first) for budget in args.budgets]
    runs += [(args.budgets[0], other) for other in others]
    for budget, device_budget in runs:
        args.device_budget = device_budget
        for prefetch in args.prefetches:
            some = Namespace(**vars(args) | {"budget": budget, "prefetch": prefetch})
            filled.renew(offload_config(some))
            start_peak(model)
            run = partial(retrieval_steps, some, model, filled, tokens, 1)
            settings = f"budget {budget}, prefetch {prefetch}: "
            yield attempted(run, "retrieval", tokens, 1, settings)
        if device_budget == first:
            filled.renew(offload_config(some, prefetch="none"))
            yield checks(some, model, filled, needles, tokens)
            release_memory()
    if args.exact:
        filled.renew(offload_config(args, mode="exact", prefetch="none"))
        cache = OffloadedCache(config, filled.runtime.config)
        cache.runtime = filled.runtime
        yield exact_steps(model, cache, filled, tokens, 1, repeats=1)
    del filled
    release_memory()
    yield full_attention(args, model, tokens, 1)


def checks(
    args: Namespace, model: LlamaForCausalLM, filled: FilledContexts, needles: Needles, tokens: int
) -> Result:
    """How many needles a step finds, and how far outputs of sampled layers are from exact ones."""
    args.prefetch = "none"
    steps = WalkedSteps(model, filled.layers, *walks(args, model, 1))
    shape = steps.engine.shape
    found = []
    token_ids = [context.paged.token_ids.view for context in filled.layers]
    for depth, position in enumerate(needles.positions):
        queries = needles.queries(depth, shape.group, QUERY_SCALE * shape.head_dim**0.5)
        chosen = steps.watched_step(queries.to(steps.walk)).chosen
        for number, pages in chosen.items():
            # layers that share pages have the needles of the layer whose pages they are
            if number < filled.host_layers:
                wanted = page_of(token_ids[number], position).to(pages)
                found.append((pages[0] == wanted[:, None]).any(-1))
    errors = _errors(steps)
    say("checked")
    extra = {"budget": args.budget, "bytes_read_of": engine_bytes(steps.engine)}
    return Result("checks", tokens, 1, extra=extra | figures(found, errors))


def _errors(steps: WalkedSteps) -> Tensor:
    """Relative L2 of the output of query heads, in sampled layers and steps."""
    count = len(steps.engine.layers)
    sampled = sorted({round(i * (count - 1) / (SAMPLED_LAYERS - 1)) for i in range(SAMPLED_LAYERS)})
    errors = []
    for _ in range(SAMPLED_STEPS):
        out = steps.watched_step().out
        for number in sampled:
            query = steps.queries[number]
            exact = exact_layer(steps.engine, number, query, steps.logits)
            errors.append(relative_error(out[number][:, :, 0].float(), exact).flatten())
    return torch.cat(errors)
