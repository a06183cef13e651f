"""Train the bundled demo model: a small Llama that answers questions about planted facts.

One CUDA GPU, about ten minutes on an H200:

    python bench/train_demo_model.py --phase short --out runs/short
    python bench/train_demo_model.py --phase long --start runs/short --out runs/long

Contexts grow from 512 to 64K tokens; the long phase then settles on 32K. The loss weighs answers 1
and other text 0.1. Weights are
rounded to int8 rows at the end and what is evaluated is what is shipped. Writes model.safetensors,
config.json and train.json (settings, log, accuracy) to --out.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
)

from wavekv.demo import corpus, facts
from wavekv.model_adapters.quantised import quantise_rows, restore_rows

ASSETS = Path(__file__).parent.parent / "wavekv" / "demo" / "assets"
TEXT_WEIGHT = 0.1
EVALUATED = (4096, 16384, 32768, 65536)
VALUE_TOKENS = 6
"""Five digits and the newline that ends an answer."""


@dataclass(frozen=True)
class Stage:
    """One context length of the curriculum."""

    length: int
    steps: int
    tokens_per_step: int
    planted: int
    asked: int
    distractors: int


PHASES = {
    "short": (
        # little text, many questions: here the retrieval circuit appears
        Stage(512, 1800, 65536, planted=9, asked=9, distractors=2),
        Stage(1024, 1200, 131072, planted=14, asked=12, distractors=4),
        Stage(4096, 600, 131072, planted=32, asked=32, distractors=12),
        Stage(16384, 250, 131072, planted=64, asked=64, distractors=24),
        Stage(65536, 110, 131072, planted=128, asked=96, distractors=32),
    ),
    "long": (
        Stage(16384, 100, 131072, planted=64, asked=64, distractors=24),
        Stage(65536, 60, 131072, planted=128, asked=96, distractors=32),
        Stage(32768, 300, 131072, planted=96, asked=64, distractors=24),
    ),
}
PEAK_LEARNING_RATE = {"short": 2e-3, "long": 5e-4}
FIRST_ANSWER_WEIGHT = 4.0
"""The first question follows the context directly, as every question does in use."""


class PlantedText(IterableDataset):
    """Endless rows (tokens [T + 1], weight of each token as a target [T + 1])."""

    def __init__(self, stage: Stage, split: corpus.Split, seed: int) -> None:
        self.stage, self.seed = stage, seed
        self.tokenizer = Tokenizer.from_file(str(ASSETS / "tokenizer.json"))
        pieces = [s for p in corpus.passages(split) for s in facts.sentences(p)]
        self.text = [np.array(e.ids, dtype=np.int32) for e in self.tokenizer.encode_batch(pieces)]
        self.lengths = np.array([len(t) for t in self.text])

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(self.seed * 1009 + (worker.id if worker else 0))
        while True:
            yield self.row(rng)

    def row(self, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
        stage = self.stage
        planted = facts.draw_facts(stage.planted, rng)
        asked = rng.sample(planted, stage.asked)
        noise = facts.draw_distractors(stage.distractors, planted, rng)
        statements = [" " + s for s in [f.statement for f in planted] + noise]
        rng.shuffle(statements)
        questions = self._encode([f.question + f.value + "\n" for f in asked])
        inserted = self._encode(statements)
        room = stage.length + 1 - sum(map(len, questions)) - sum(map(len, inserted))
        context = np.concatenate(facts.weave(self._text_of(room, rng), inserted, rng))
        tokens = np.concatenate([context, *questions])
        weights = np.full(len(tokens), TEXT_WEIGHT, dtype=np.float32)
        end = len(context)
        for number, question in enumerate(questions):
            end += len(question)
            weights[end - VALUE_TOKENS : end] = FIRST_ANSWER_WEIGHT if number == 0 else 1.0
        return tokens.astype(np.int64), weights

    def _encode(self, strings: list[str]) -> list[np.ndarray]:
        return [np.array(e.ids, dtype=np.int32) for e in self.tokenizer.encode_batch(strings)]

    def _text_of(self, length: int, rng: random.Random) -> list[np.ndarray]:
        """Consecutive sentences from random places, `length` tokens in all."""
        chosen, total = [], 0
        while total < length:
            start = rng.randrange(len(self.text))
            for piece in self.text[start : start + rng.randrange(20, 200)]:
                if total >= length:
                    break
                chosen.append(piece[: length - total])
                total += len(chosen[-1])
        return chosen


def causal_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Causal attention without a mask tensor: a traced forward would build one of T x T."""
    out = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


def model_config(vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=384,
        intermediate_size=896,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1 << 20,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


def loader(stage: Stage, split: corpus.Split, rows: int, seed: int, workers: int) -> DataLoader:
    data = PlantedText(stage, split, seed)
    return DataLoader(
        data, batch_size=rows, num_workers=workers, prefetch_factor=4, pin_memory=True
    )


def learning_rate(
    step: int, steps: int, peak: float, warmup: int = 100, hold: float = 0.7
) -> float:
    """Linear warm-up, constant for `hold` of the run, then half a cosine down to 8 %."""
    if step < warmup:
        return peak * (step + 1) / warmup
    decay = max(0.0, step / steps - hold) / (1 - hold)
    return peak * (0.08 + 0.92 * 0.5 * (1 + math.cos(math.pi * decay)))


def train(model: LlamaForCausalLM, args: argparse.Namespace, log: list[dict]) -> None:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    peak = PEAK_LEARNING_RATE[args.phase]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)
    compiled = torch.compile(model)
    stages = PHASES[args.phase]
    total, step, began = sum(s.steps for s in stages), 0, time.time()
    for stage in stages:
        rows = stage.tokens_per_step // stage.length
        batches = iter(
            loader(
                stage,
                "train",
                rows,
                args.seed + stage.length + 7 * (args.phase == "long"),
                args.workers,
            )
        )
        for _ in range(stage.steps):
            tokens, weights = (x.cuda(non_blocking=True) for x in next(batches))
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, total, peak)
            loss, answer_loss, right = planted_loss(compiled, tokens, weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            if step % 50 == 0 or step == total - 1:
                entry = {
                    "step": step,
                    "length": stage.length,
                    "loss": round(loss.item(), 4),
                    "answer_loss": round(answer_loss.item(), 4),
                    "answer_tokens_right": round(right.item(), 4),
                    "seconds": round(time.time() - began, 1),
                }
                log.append(entry)
                print(entry, flush=True)
            step += 1


def planted_loss(model, tokens, weights):
    """Weighted cross entropy, and the loss and token accuracy on answers alone."""
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = model(input_ids=tokens[:, :-1], use_cache=False)
    logits, target, weight = (
        out.logits.flatten(0, 1),
        tokens[:, 1:].flatten(),
        weights[:, 1:].flatten(),
    )
    each = F.cross_entropy(logits.float(), target, reduction="none")
    answers = (weight >= 1.0).float()
    right = ((logits.detach().argmax(-1) == target) * answers).sum() / answers.sum()
    return (
        (each * weight).sum() / weight.sum(),
        (each.detach() * answers).sum() / answers.sum(),
        right,
    )


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, length: int, count: int, seed: int) -> float:
    """Share of single questions, after held-out text of `length` tokens, answered right."""
    planted = max(16, length // 512)
    stage = Stage(length, 0, 0, planted=planted, asked=1, distractors=planted // 4)
    data = PlantedText(stage, "heldout", seed)
    rng, right = random.Random(seed), 0
    rows = max(1, 262144 // length)
    for start in range(0, count, rows):
        tokens = torch.tensor(np.stack([data.row(rng)[0] for _ in range(min(rows, count - start))]))
        with torch.autocast("cuda", dtype=torch.bfloat16):
            hidden = model.model(input_ids=tokens[:, :-1].cuda(), use_cache=False)[0]
            guess = model.lm_head(hidden[:, -VALUE_TOKENS:]).argmax(-1).cpu()
        right += (guess == tokens[:, -VALUE_TOKENS:]).all(-1).sum().item()
    return right / count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phase", choices=PHASES, required=True)
    parser.add_argument("--start", type=Path, help="folder of the phase before")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--questions", type=int, default=300, help="evaluation questions a length")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    vocab_size = Tokenizer.from_file(str(ASSETS / "tokenizer.json")).get_vocab_size()
    AttentionInterface.register("causal_only", causal_attention)
    AttentionMaskInterface.register("causal_only", lambda *args, **kwargs: None)
    model = LlamaForCausalLM(model_config(vocab_size)).cuda()
    model.set_attn_implementation("causal_only")
    if args.start:
        model.load_state_dict(
            restore_rows(load_file(args.start / "model.safetensors")), strict=False
        )
    log: list[dict] = []
    train(model, args, log)
    packed = quantise_rows({k: v for k, v in model.state_dict().items() if k != "lm_head.weight"})
    save_file(packed, args.out / "model.safetensors")
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.to_json_file(args.out / "config.json")
    model.load_state_dict(restore_rows(packed), strict=False)
    accuracy = {n: evaluate(model, n, args.questions, args.seed + 7) for n in EVALUATED}
    before = json.loads((args.start / "train.json").read_text()) if args.start else None
    record = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {
            "gpu": torch.cuda.get_device_name(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "stages": [asdict(s) for s in PHASES[args.phase]],
        "accuracy_full_attention": accuracy,
        "before": before,
        "log": log,
    }
    (args.out / "train.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({"parameters": record["parameters"], "accuracy": accuracy}))


if __name__ == "__main__":
    main()
