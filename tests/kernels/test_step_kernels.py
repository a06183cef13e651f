"""Every Triton kernel of a decode step against its torch twin: on a GPU, or in Triton's
interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from step_cases import Case, copied, make_case, run_step

from wavekv.kernels import step_reference
from wavekv.kernels.page_codec import encode_pages
from wavekv.kernels.step import CLOCK, END

pytest.importorskip("triton")
cuda = pytest.importorskip("wavekv.kernels.cuda")

DEVICES = ["cuda" if torch.cuda.is_available() else "cpu"]
# the interpreter multiplies bfloat16 wrongly
DTYPES = (
    [torch.bfloat16, torch.float16, torch.float32] if torch.cuda.is_available() else [torch.float32]
)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

CASES: dict[str, dict[str, Any]] = {
    "plain": {"group": 4},
    "softcap": {"softcap": 5.0, "spread": 2.0, "group": 4},
    "top_p": {"top_p": 0.6, "spread": 3.0, "scale": 0.3, "group": 4},
    "top_p at the floor": {"top_p": 0.01, "least": 7},
    "first moment": {"tail": "first"},
    "no estimate": {"tail": "none"},
    "head of 80, no group": {"head_dim": 80, "group": 1},
    "head of 96, group of 7, two sequences": {
        "head_dim": 96,
        "group": 7,
        "batch": 2,
        "kv_heads": 1,
    },
    "head of 128, pages of 16": {"head_dim": 128, "page_size": 16, "group": 4},
    "head of 192": {"head_dim": 192, "kv_heads": 1, "num_pages": 256},
    "head of 256": {"head_dim": 256, "kv_heads": 1, "seed": 1},
    "pages of 4": {"page_size": 4},
    "few misses allowed": {"misses": 5},
    "all pages chosen": {"most": 256, "slots": 256, "misses": 256},
    "no candidates": {"candidates": 0},
    "no pages": {"num_pages": 0},
    "one page": {"num_pages": 1, "block_pages": 1},
    "blocks of 16": {"block_pages": 16},
    "blocks of 2, softcap": {"block_pages": 2, "softcap": 5.0},
    "one page of many": {"num_pages": 256, "most": 1, "least": 1, "slots": 3},
    "spans of 160": {"span_pages": 160, "capacity": 320, "num_pages": 300},
    "pages of 8 bits": {"bits": (8, 8)},
    "pages of 8 bits, head of 128": {"bits": (8, 8), "head_dim": 128, "most": 200, "slots": 200},
    "pages of 4 bits": {"bits": (4, 4), "batch": 2, "kv_heads": 1},
    "pages of 5 tokens, 4 and 2 bits, head of 96": {
        "bits": (4, 2),
        "page_size": 5,
        "head_dim": 96,
    },
    # all pages are candidates: a bin of ranks is taken whole
    "equal ranks": {"scale": 0.0, "num_pages": 72, "capacity": 80},
    "sharp": {"scale": 4.0, "spread": 4.0, "num_pages": 72, "capacity": 80},
    "two blocks of pages, more chosen than ranked again": {
        "num_pages": 1200,
        "capacity": 1300,
        "most": 130,
        "slots": 300,
        "misses": 130,
    },
}
if torch.cuda.is_available():
    # minutes in the interpreter
    CASES["so many that a sample finds the candidates"] = {
        "num_pages": 8300,
        "capacity": 8400,
        "most": 170,
        "candidates": 2700,
        "slots": 400,
        "misses": 170,
        "kv_heads": 1,
    }


def poison(case: Case) -> None:
    """What a step must write before it is read."""
    for part in case.scratch:
        if part.dtype.is_floating_point:
            part.fill_(torch.nan)
        elif part.dtype in (torch.int32, torch.int64):
            part.fill_(-7)


def of_rank(case: Case, least: float) -> torch.Tensor:
    """[B, Hkv, N] whether a page is chosen and has a rank of `least` at least."""
    rank, chosen = case.scratch.rank, case.scratch.chosen
    found = torch.zeros(*rank.shape[:2], rank.shape[2] + 1, dtype=torch.bool, device=rank.device)
    found.scatter_(2, chosen.long().where(chosen >= 0, rank.shape[2]), True)
    ranks = rank.clamp(min=0).view(torch.float32).masked_fill(rank < 0, 0.0)
    return found[..., :-1] & (ranks >= least)


def chosen_of(case: Case, twin: Case) -> tuple[torch.Tensor, torch.Tensor]:
    return case.scratch.chosen, twin.scratch.chosen


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_step_as_twin(name: str, device: str, dtype: torch.dtype) -> None:
    twin = make_case(device=device, dtype=dtype, **CASES[name])
    case = copied(twin)
    poison(case)
    expected, out = run_step(step_reference, twin), run_step(cuda, case)
    n = int(twin.counters[2])
    assert difference(out, expected) < TOLERANCE[dtype]
    # of pages without any mass to speak of, any will do
    matters = [of_rank(each, 1e-30) for each in (case, twin)]
    same = (matters[0] == matters[1]).float().mean()
    # in half precision ranks that are close may change places
    assert same == 1 if dtype == torch.float32 else same > 0.9
    # where attention is sharp most pages have no mass at all, and devices choose others of them
    assert name == "sharp" or dtype != torch.float32 or torch.equal(*chosen_of(case, twin))
    if dtype == torch.float32 and torch.equal(*chosen_of(case, twin)):
        for part in ("slots", "tokens", "num_misses"):
            assert torch.equal(getattr(case.scratch, part), getattr(twin.scratch, part))
        assert torch.equal(case.scratch.status[..., :n], twin.scratch.status[..., :n])
        for ours, theirs in zip(case.pool, twin.pool, strict=True):
            if twin.shape.codec is None or not ours.is_floating_point():
                assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
            else:
                # one rounding or two
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert torch.equal(case.totals.paging, twin.totals.paging)


@pytest.mark.parametrize("device", DEVICES)
def test_steps_in_a_row(device: str) -> None:
    twin = make_case(3, device=device, misses=12)
    case = copied(twin)
    sinks = torch.linspace(-2, 2, twin.query.shape[1], device=device)
    random = torch.Generator().manual_seed(5)
    for _ in range(3):
        move = torch.randn(twin.query.shape, generator=random).to(device)
        outs = []
        for each, ops in ((twin, step_reference), (case, cuda)):
            each.query.copy_(0.7 * each.query + 0.7 * move)
            outs.append(run_step(ops, each, sinks))
            each.counters[END] += 1
            each.counters[CLOCK] += 1
        assert difference(outs[1], outs[0]) < TOLERANCE[torch.float32]
        for ours, theirs in zip(case.pool[1:], twin.pool[1:], strict=True):
            assert torch.equal(ours, theirs)
    assert int(twin.totals.paging[..., 0].sum()) > 0
    assert torch.allclose(case.totals.tail_mass, twin.totals.tail_mass, atol=1e-5)


@pytest.mark.parametrize("is_coded", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_store_as_twin(device: str, is_coded: bool) -> None:
    case = make_case(4, device=device, bits=(4, 8) if is_coded else None)
    width = case.pool.pages.shape[4:]
    pages = torch.randn(40, 2, *width, device=device)
    if is_coded:
        pages = encode_pages(pages, None, case.shape.codec)
    ids = torch.randperm(2 * case.arena.pages_per_chunk)[:40].to(device)
    cuda.store(pages, ids, case.arena)
    if device == "cuda":
        torch.cuda.synchronize()
    for page, arena_id in zip(pages.cpu(), ids.tolist(), strict=True):
        chunk, slot = divmod(arena_id, case.arena.pages_per_chunk)
        assert torch.equal(case.arena.memory[chunk][slot], page)
