"""The pages that a stage of ranking finds likely to be chosen: those of the kernels, those of the
twins, and what they are."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import implementation
from step_cases import Case, make_case

from wavekv.kernels.step import CANDIDATES, FIRST, LIKELY, MOST, SECOND, StepScratch

pytestmark = pytest.mark.usefixtures("_one_thread")

ROOM = 20


def listed(ops: ModuleType, case: Case) -> list[StepScratch]:
    """What both stages list, with `ROOM` for it."""
    scratch, found = case.scratch, []
    new = case.query, case.new_keys, case.new_values, case.new_valid
    ops.score(*new, case.steady, case.pages, case.counters, scratch, case.shape)
    for stage in FIRST, SECOND:
        ops.rank_pages(case.pages, case.counters, case.limits, scratch, case.shape, stage=stage)
        room = torch.full((*scratch.chosen.shape[:2], ROOM), -7, dtype=torch.int32)
        own = scratch._replace(
            chosen=room.to(scratch.chosen.device), block_count=scratch.block_count.clone()
        )
        ops.list_likely(case.counters, own, case.shape, stage=stage)
        found.append(own._replace(rank=scratch.rank.clone(), likely=scratch.likely[stage].clone()))
        ops.refine(case.pages, case.counters, scratch, case.shape, stage=stage)
    return found


def check_lists(case: Case, found: list[StepScratch]) -> None:
    """The pages whose rank reaches the threshold, ascending, then -1; of these at least as many as
    are wanted are alive, unless the bins do not tell them apart."""
    n = int(case.counters[2])
    for stage, scratch in enumerate(found):
        wanted = int(case.limits[LIKELY + stage])
        for rank, least, chosen in zip(
            scratch.rank[..., :n].flatten(0, 1).cpu(),
            scratch.likely.flatten().cpu(),
            scratch.chosen.flatten(0, 1).cpu(),
            strict=True,
        ):
            reaching = (rank >= least).nonzero().flatten().tolist()
            expected = reaching[:ROOM]
            assert chosen.tolist() == expected + [-1] * (ROOM - len(expected))
            if wanted == 0:
                assert not reaching
            elif reaching:
                assert len(reaching) >= wanted


@pytest.mark.parametrize("name", ["torch", "triton"])
@settings(max_examples=12)
@given(
    seed=st.integers(0, 999),
    num_pages=st.sampled_from([0, 1, 40, 200]),
    wanted=st.tuples(st.integers(0, 24), st.integers(0, 40)),
    candidates=st.sampled_from([0, 64]),
    scale=st.sampled_from([0.0, 0.1, 2.0]),
)
def test_lists_are_of_the_best(
    name: str,
    seed: int,
    num_pages: int,
    wanted: tuple[int, int],
    candidates: int,
    scale: float,
) -> None:
    ops, device = implementation(name)
    case = make_case(
        seed,
        num_pages=num_pages,
        kv_heads=1,
        head_dim=32,
        scale=scale,
        block_pages=1,
        device=device,
    )
    case.limits[LIKELY], case.limits[LIKELY + 1] = wanted
    case.limits[CANDIDATES] = candidates
    check_lists(case, listed(ops, case))


def test_kernels_list_as_the_twins() -> None:
    lists = []
    for name in ("torch", "triton"):
        ops, device = implementation(name)
        case = make_case(3, num_pages=1200, capacity=1300, most=100, slots=400, device=device)
        case.limits[MOST], case.limits[LIKELY], case.limits[LIKELY + 1] = 100, 8, 12
        found = listed(ops, case)
        check_lists(case, found)
        lists.append([scratch.chosen.cpu() for scratch in found])
    for mine, theirs in zip(*lists, strict=True):
        assert (mine >= 0).any()
        # a page at the edge of a bin may be on either side of it
        assert (mine != theirs).float().mean() < 0.1
