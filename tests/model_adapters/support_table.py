"""Writes docs/support.md from the matrix that test_families.py runs: `python <this file>`."""

from __future__ import annotations

from pathlib import Path

from tiny_models import FAMILIES, SCENARIOS

PAGE = Path(__file__).parents[2] / "docs" / "support.md"

_HEAD = """\
# Supported models

<!-- Written by tests/model_adapters/support_table.py from the tested matrix. Do not edit. -->

Each row is a `model_type` of transformers; each ✓ a test on every change: a small random model of
that type, wrapped, generates token for token what the unwrapped model generates with eager
attention. It is run in `mode="exact"` and in `mode="retrieval"` with a budget of everything; it
passes with transformers 5.17.0 and 5.23.0. A dash is what transformers itself refuses.

"""

_LAYERS = """
*Layers* says what the layers of the tested model attend to. Full-attention layers are offloaded;
sliding windows, chunks and linear-attention states are small and stay as transformers keeps them.
Those cannot go back once they have moved on, so `crop()` is refused then: `fork()` before the
tokens come instead.

Streaming, logits processors, sampling several sequences, decode loops by hand, forks, and running
without a cache (`use_cache=False`) are tested on one type or one of each kind of layers. Other
types that use transformers' attention interface may well work: wrapping one that cannot raises
`UnsupportedModelError` with the reason, and one that turns out at its first forward to route keys
past wavekv's attention fails there rather than answer wrongly.

"""

_LIMITS = (
    (
        "Multi-head latent attention (DeepSeek-V2, V3 and relatives, `kv_lora_rank`)",
        "the cache holds latents, not the keys that attention sees; refused when wrapped",
    ),
    (
        "Keys shared between layers (Gemma 3n, Gemma 4 with `num_kv_shared_layers`)",
        "one cached key is attended to by several layers; refused when wrapped",
    ),
    (
        "Encoder-decoder models",
        "their cross-attention has a cache of its own; refused when wrapped",
    ),
    (
        "No full-attention layer (all windows, or all recurrent), and layers that mix attention "
        "with a recurrent state (Falcon-H1, Zamba)",
        "nothing that wavekv could offload; refused when wrapped",
    ),
    (
        "Attention outside transformers' attention interface (Falcon, MPT, XGLM, much code from "
        "model repositories)",
        "it cannot be switched; refused when wrapped",
    ),
    (
        "Models that select keys themselves, add a position bias, or have value heads of another "
        "size than key heads (MiMo-V2-Flash)",
        "refused at the first forward",
    ),
    (
        "Custom 4-D masks, packed sequences, image tokens that see each other",
        "only causal attention with padding can be offloaded; refused at that forward",
    ),
    (
        "A mask that changes for cached tokens",
        "padding is remembered with the tokens; a forward of several tokens that says otherwise is "
        "an error, a single token away from the CPU is not checked",
    ),
    (
        "`output_attentions`",
        "attention weights are never all computed; refused at that forward",
    ),
    ("Gradients", "a cached forward must run under `torch.no_grad()`; `use_cache=False` trains"),
    ("`generate_batch`, `cache_implementation`", "they bring another cache; refused"),
    (
        "Assisted decoding (prompt lookup, assistant models)",
        "the prompt is taken in one forward, not in chunks, and the cache must be empty: "
        "transformers feeds the whole prompt again",
    ),
    (
        "A second turn after beam search",
        "the cache is left with one sequence for each beam, as they stood at the last step; start "
        "a new one",
    ),
    (
        "`longrope` (Phi-3 and 4)",
        "keys are rotated differently beyond a length. A prompt beyond it is exact; a cache from "
        "before cannot go on beyond it, and when an answer crosses it transformers goes on with a "
        "cache of its own, which is not offloaded",
    ),
    (
        "`dynamic` rotary scaling",
        "beyond the trained length the rotation depends on how the text was cut into forwards, in "
        "transformers too; chunks may give slightly other answers than one forward",
    ),
)


def render() -> str:
    """The page."""
    head = ["`model_type`", "layers", *SCENARIOS.values()]
    rows = [
        [f"`{family.model_type}`", family.layers]
        + ["–" if name in family.unsupported else "✓" for name in SCENARIOS]
        for family in sorted(FAMILIES, key=lambda family: family.model_type)
    ]
    aligned = ["---", "---", *(":-:" for _ in SCENARIOS)]
    table = "".join(f"| {' | '.join(row)} |\n" for row in [head, aligned, *rows])
    limits = "".join(f"| {what} | {why} |\n" for what, why in _LIMITS)
    return (
        f"{_HEAD}{table}{_LAYERS}## Limits\n\n| what | why, and what happens |\n|---|---|\n{limits}"
    )


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
