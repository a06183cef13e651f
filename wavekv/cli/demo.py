"""`wavekv demo`: questions about a long text, by full attention, exact offload and retrieval."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from wavekv import OffloadConfig
from wavekv.cli.answering import Answers, ask, timed
from wavekv.cli.retrieved import show_retrieved_page
from wavekv.demo.context import PlantedContext, plant
from wavekv.model_adapters import OffloadedCache, OffloadedKV
from wavekv.model_adapters.bundled import (
    full_attention_cache,
    load_demo_model,
    load_demo_tokenizer,
)

ALLOWED_LOSS = 1
"""Questions that retrieval may answer less than full attention before the demo counts as failed."""


def add_parser(commands: Any) -> None:
    """Add the `demo` subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo", help="answer questions about a long text with the bundled model"
    )
    parser.add_argument("--file", type=Path, help="plant the facts in this text instead")
    parser.add_argument("--tokens", type=int, default=32768, help="context length")
    parser.add_argument("--questions", type=int, default=48, help="at most one in 512 tokens")
    parser.add_argument("--budget", type=float, default=0.02, help="share of tokens to retrieve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the demo; 1 if retrieval loses more than one question against full attention."""
    _check(options)
    tokenizer = load_demo_tokenizer()
    text = None if options.file is None else options.file.read_text(encoding="utf-8")
    context = plant(
        options.tokens,
        lambda strings: [e.ids for e in tokenizer.encode_batch(strings)],
        seed=options.seed,
        text=text,
    )
    result = measure(context, tokenizer, options)
    print_table(result)
    if options.json:
        print(json.dumps(result))
    correct = result["correct"]
    return int(correct["retrieval"] < correct["full"] - ALLOWED_LOSS)


def _check(options: argparse.Namespace) -> None:
    """Refuse bad options before any work."""
    OffloadConfig(budget=options.budget)
    if options.questions < 1:
        raise ValueError(f"expected at least 1 question, got {options.questions}")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"expected a CUDA device for --device {options.device}, found none; use --device cpu"
        )


@torch.inference_mode()
def measure(context: PlantedContext, tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Ask every question in every mode."""
    model = load_demo_model().to(options.device)
    asked = context.facts[: options.questions]
    ids = torch.tensor([context.token_ids], device=options.device)
    questions = [
        torch.tensor([tokenizer.encode(fact.question).ids], device=options.device) for fact in asked
    ]
    print(f"{ids.shape[1]} tokens of text, {len(asked)} questions, budget {options.budget:.1%}")
    answers = {mode: Answers() for mode in ("full", "exact", "retrieval")}

    full = full_attention_cache(model)
    print("full attention: prefill ...")
    prefill_full = timed(lambda: model(input_ids=ids, past_key_values=full, logits_to_keep=1))
    bytes_full = sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers)
    for question in tqdm(questions, desc="full attention"):
        ask(model, full, question, answers["full"], tokenizer.decode)
        full.crop(ids.shape[1] - full.get_seq_length())

    with OffloadedKV(model, budget=options.budget) as wrapped:
        cache = wrapped.new_cache()
        prefill_offloaded = timed(lambda: _prefill(wrapped, ids, cache))
        for question in tqdm(questions, desc="exact"):
            ask(wrapped, cache.fork(mode="exact"), question, answers["exact"], tokenizer.decode)
        shares = []
        for number, question in enumerate(tqdm(questions, desc="retrieval")):
            fork = cache.fork()
            show = _worked_question(number, context, fork, tokenizer)
            ask(wrapped, fork, question, answers["retrieval"], tokenizer.decode, show)
            shares.append(fork.stats()["retrieved_fraction"])
        held = cache.stats()
    values = [fact.value for fact in asked]
    return {
        "context_tokens": ids.shape[1],
        "questions": len(asked),
        "budget": options.budget,
        "retrieved_fraction": sum(shares) / len(shares),
        "correct": {mode: answers[mode].num_right(values) for mode in answers},
        "exact_tokens_equal_full": answers["exact"].tokens == answers["full"].tokens,
        "tpot_ms": {mode: answers[mode].tpot_ms for mode in answers},
        "prefill_s": {"full": prefill_full, "offloaded": prefill_offloaded},
        "kv_bytes": {"device": held["bytes_device"], "host": held["bytes_host"]},
        "kv_bytes_full": bytes_full,
    }


def print_table(result: dict[str, Any]) -> None:
    """Print the result for people."""
    sizes = {**result["kv_bytes"], "full": result["kv_bytes_full"]}
    mib = {tier: f"{size / 2**20:.0f} MiB" for tier, size in sizes.items()}
    prefill, modes = result["prefill_s"], ("full", "exact", "retrieval")
    once = f"{prefill['offloaded']:.1f} s"
    rows: list[tuple[str, ...]] = [
        ("", "full attention", "exact", "retrieval"),
        ("answers right", *(f"{result['correct'][m]} of {result['questions']}" for m in modes)),
        ("tokens retrieved", "all", "all", f"{result['retrieved_fraction']:.1%}"),
        ("time per token", *(f"{result['tpot_ms'][m]:.1f} ms" for m in modes)),
        ("prefill", f"{prefill['full']:.1f} s", once, "(the same)"),
        ("KV on the device side", mib["full"], mib["device"], mib["device"]),
        ("KV in host pages", "-", mib["host"], mib["host"]),
    ]
    print()
    for row in rows:
        print(f"{row[0]:<24}" + "".join(f"{cell:>18}" for cell in row[1:]))


def _prefill(wrapped: OffloadedKV, ids: torch.Tensor, cache: OffloadedCache) -> None:
    wrapped.prefill(ids, cache, progress=True)
    cache.settle()


def _worked_question(
    number: int, context: PlantedContext, cache: OffloadedCache, tokenizer: Any
) -> Callable[[], None] | None:
    """For the first question: show a page that the step for its first digit retrieved."""
    if number != 0:
        return None
    return lambda: show_retrieved_page(context, number, cache, tokenizer.decode)
