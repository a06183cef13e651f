"""Ranks, and the pages chosen by them: against a sort, and the kernels against their twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import implementation
from selection_cases import Limits, Selection, check_selection
from torch import Tensor

from wavekv.kernels import step_reference

pytestmark = pytest.mark.usefixtures("_one_thread")

KINDS = ["equal", "grid", "close", "normal", "sharp", "decades", "one of all", "few of all"]
CROWDED = ["equal", "grid", "close", "sharp", "one of all", "few of all"]
"""Kinds of many pages in one bin of ranks. A bin is taken whole: all of them are candidates."""


def random_masses(kind: str, seed: int, size: tuple[int, int, int, int]) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    normal = torch.randn(size, generator=random)
    uniform = torch.rand(size, generator=random)
    if kind == "equal":
        return torch.full(size, 3.5)
    if kind == "grid":
        # few values, many equal ones; equal in all heads of a group
        return (uniform[:, :, :1] * 5).floor().expand(size).clone()
    if kind == "close":
        return 1e-4 * normal
    if kind == "normal":
        return 3 * normal
    if kind == "sharp":
        return 30 * normal
    if kind == "decades":
        return uniform * -30 * np.log(10)
    # one page, or some, have nearly all
    shares = torch.rand(size[0], size[1], 1, size[3], generator=random)
    is_large = shares >= shares.amax(-1, keepdim=True) if kind == "one of all" else shares > 0.9
    return torch.where(is_large, 0.0, -30.0) + normal


EMPTY = ["none", "a third", "all but one", "all", "all of the first head"]


def random_empty(which: str, seed: int, B: int, H: int, n: int) -> Tensor:
    random = torch.Generator().manual_seed(seed + 1)
    is_empty = torch.rand(B, H, n, generator=random) < 1 / 3
    if which == "none":
        is_empty[:] = False
    if which in ("all", "all but one"):
        is_empty[:] = True
    if which == "all but one":
        alive = torch.randint(n, (B, H, 1), generator=random)
        is_empty.scatter_(2, alive, False)
    if which == "all of the first head":
        is_empty[:, 0] = True
    return is_empty


LIMITS = st.builds(
    Limits,
    most=st.sampled_from([1, 2, 7, 64, 130]) | st.integers(1, 300),
    least=st.sampled_from([1, 2, 7, 64]),
    wide=st.just(0),
    top_p=st.none() | st.sampled_from([0.001, 0.25, 0.5, 0.75, 1.0]) | st.floats(0.01, 0.99),
    candidates=st.sampled_from([0, 1, 100, 4000]),
)


def random_selection(name: str, data: st.DataObject, sizes: st.SearchStrategy[int]) -> Selection:
    is_slow = name == "triton"
    n, seed = data.draw(sizes), data.draw(st.integers(0, 2**20))
    B, H = data.draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2)][: 2 if is_slow else 4]))
    G = data.draw(st.integers(1, 3 if is_slow else 7))
    limits = data.draw(LIMITS)
    limits = limits._replace(least=min(limits.least, limits.most))
    kind, empty = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(EMPTY))
    if is_slow:
        limits = limits._replace(candidates=min(limits.candidates, 40))
        if n > 300:
            # the fewer are chosen, the more blocks has a list of equal ranks
            limits = limits._replace(most=max(limits.most, 64))
            if kind in CROWDED and not torch.cuda.is_available():
                # more than a minute in the interpreter
                limits = limits._replace(candidates=0)
    if data.draw(st.booleans()):
        limits = limits._replace(wide=max(limits.most, int(1.5 * min(limits.most, n))))
    return Selection(
        *implementation(name),
        random_masses(kind, seed, (B, H, G, n)),
        random_empty(empty, seed, B, H, n),
        limits,
        spare=data.draw(st.sampled_from([0, 1, 30])),
    )


@settings(max_examples=150)
@given(data=st.data())
def test_twin_chooses_as_a_sort(data: st.DataObject) -> None:
    edges = [1, 2, 63, 64, 65, 128, 1023, 1024, 1025, 2048, 2049, 3000]
    sizes = st.sampled_from(edges) | st.integers(1, 3000)
    check_selection(random_selection("torch", data, sizes))


@settings(max_examples=25)
@given(data=st.data())
def test_kernels_choose_as_a_sort(data: st.DataObject) -> None:
    sizes = st.sampled_from([1, 2, 63, 65, 300, 1023, 1025, 2049, 3000])
    check_selection(random_selection("triton", data, sizes))


@settings(max_examples=100)
@given(
    masses=st.lists(
        st.lists(
            st.sampled_from([0.0, -1.0, -24.0]) | st.floats(-80, 80, width=32),
            min_size=2,
            max_size=2,
        ),
        min_size=1,
        max_size=12,
    ),
    empty=st.integers(0, 2**12 - 1),
    most=st.integers(1, 14),
    least=st.integers(1, 14),
    top_p=st.none() | st.floats(0.001, 1.0),
    wide=st.booleans(),
)
def test_twin_chooses_as_a_sort_of_few(
    masses: list[list[float]],
    empty: int,
    most: int,
    least: int,
    top_p: float | None,
    wide: bool,
) -> None:
    """Small, and free to choose every mass: what fails here is easy to read."""
    n = len(masses)
    log_mass = torch.tensor(masses).T.reshape(1, 1, 2, n)
    is_empty = torch.tensor([bool(empty >> i & 1) for i in range(n)]).view(1, 1, n)
    limits = Limits(most, min(least, most), int(1.5 * most) if wide else 0, top_p)
    check_selection(Selection(step_reference, "cpu", log_mass, is_empty, limits))


@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**20),
    kind=st.sampled_from(["grid", "equal", "normal", "decades"]),
    size=st.sampled_from([(5, 1), (5, 7), (70, 1), (70, 6), (1030, 200), (2500, 300)]),
    wide=st.booleans(),
)
def test_kernels_choose_as_the_twin(
    seed: int, kind: str, size: tuple[int, int], wide: bool
) -> None:
    """Given the same ranks, to the last bit."""
    n, most = size
    log_mass = random_masses(kind, seed, (1, 2, 3, n))
    is_empty = random_empty("a third", seed, 1, 2, n)
    limits = Limits(most, wide=int(1.5 * most) if wide else 0)
    twin = Selection(step_reference, "cpu", log_mass, is_empty, limits)
    case = Selection(*implementation("triton"), log_mass, is_empty, limits)
    twin.rank()
    case.scratch.rank.copy_(twin.scratch.rank)
    case.scratch.threshold.copy_(twin.scratch.threshold)
    for each in (twin, case):
        each.select()
    assert torch.equal(case.scratch.chosen.cpu(), twin.scratch.chosen)
    if wide:
        assert torch.equal(case.wide.cpu(), twin.wide)
