"""Train the demo model's tokenizer: byte-level BPE with single digits, on the training split.

python bench/train_demo_tokenizer.py
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from wavekv.demo import corpus, facts

ASSETS = Path(__file__).parent.parent / "wavekv" / "demo" / "assets"
END = "<|end|>"
NAME_REPEATS = 400
"""Enough for every subject's name to become one token."""


def train(vocab_size: int, seed: int) -> Tokenizer:
    """Return a tokenizer of `vocab_size` entries; single digits let values be copied one by one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(seed)
    planted = [fact for _ in range(6) for fact in facts.draw_facts(len(facts.NAMES), rng)]
    names = [f" {name}" for name in facts.NAMES] * NAME_REPEATS
    lines = (
        names
        + corpus.passages("train")
        + [f" {f.statement}{f.question}{f.value}\n" for f in planted]
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ASSETS / "tokenizer.json")
    args = parser.parse_args()
    tokenizer = train(args.vocab_size, args.seed)
    tokenizer.save(str(args.out))
    split = [name for name in facts.NAMES if len(tokenizer.encode(f" {name}").ids) != 1]
    assert not split, f"expected one token a name, got more for {split}"
    text = "\n".join(corpus.passages("heldout"))
    print(
        f"{args.out}: {tokenizer.get_vocab_size()} entries, "
        f"{len(text) / len(tokenizer.encode(text).ids):.2f} characters a token"
    )


if __name__ == "__main__":
    main()
