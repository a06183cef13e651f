"""Pages chosen where a choice goes wrong first: few pages, equal ranks, ranks far apart."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from implementations import IMPLEMENTATIONS, implementation
from selection_cases import Limits, Selection, check_selection
from torch import Tensor

from wavekv.kernels.step import COUNT_BLOCK, FIRST, SAMPLES, SECOND, is_sampled

pytestmark = pytest.mark.usefixtures("_one_thread")


def chosen_of(kernels: tuple[ModuleType, str], log_mass: Tensor, limits: Limits) -> list[int]:
    """The pages that a single head chooses of pages with log masses [n]."""
    is_empty = torch.isinf(log_mass).view(1, 1, -1)
    masses = log_mass.view(1, 1, 1, -1).masked_fill(is_empty.unsqueeze(2), 0.0)
    selection = Selection(*kernels, masses, is_empty, limits)
    check_selection(selection)
    chosen = selection.scratch.chosen.flatten().tolist()
    return [page for page in chosen if page >= 0]


def test_no_page_alive(kernels) -> None:
    nothing = torch.full((70,), -torch.inf)
    for limits in (Limits(5), Limits(5, 3, top_p=0.5), Limits(70), Limits(5, wide=7)):
        assert chosen_of(kernels, nothing, limits) == []


def test_no_pages_in_use(kernels) -> None:
    selection = Selection(
        *kernels, torch.zeros(1, 2, 3, 0), torch.zeros(1, 2, 0, dtype=torch.bool), Limits(4), 9
    )
    check_selection(selection)
    assert (selection.scratch.chosen == -1).all()


@pytest.mark.parametrize("page", [0, 37, 69])
def test_one_page_alive(kernels, page: int) -> None:
    log_mass = torch.full((70,), -torch.inf)
    log_mass[page] = -1000.0
    for limits in (Limits(1), Limits(5, 3, top_p=0.5), Limits(70), Limits(5, wide=7)):
        assert chosen_of(kernels, log_mass, limits) == [page]


def test_more_wanted_than_there_are(kernels) -> None:
    log_mass = torch.linspace(-3, 3, 70)
    log_mass[::7] = -torch.inf
    alive = [n for n in range(70) if n % 7]
    assert chosen_of(kernels, log_mass, Limits(70)) == alive
    assert chosen_of(kernels, log_mass, Limits(70, 70, top_p=0.1)) == alive


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (Limits(64, 1, top_p=0.25), 16),
        (Limits(64, 20, top_p=0.25), 20),
        (Limits(10, 4, top_p=0.25), 10),
        (Limits(64, 1, top_p=1 / 64), 1),
        (Limits(64, 1, top_p=1.0), 64),
        (Limits(64, 1, wide=96, top_p=0.5), 32),
    ],
    ids=str,
)
def test_top_p_among_ties(kernels, limits: Limits, expected: int) -> None:
    """Shares of 1 / 64 add up without rounding, and of equal ranks the lower page goes first."""
    assert chosen_of(kernels, torch.full((64,), 2.0), limits) == list(range(expected))


def test_ties_at_the_last_rank(kernels) -> None:
    log_mass = torch.zeros(100)
    log_mass[50:] = 1.0
    log_mass[99] = 2.0
    assert chosen_of(kernels, log_mass, Limits(4)) == [50, 51, 52, 99]
    assert chosen_of(kernels, log_mass, Limits(50)) == list(range(50, 100))
    assert chosen_of(kernels, log_mass, Limits(53)) == [0, 1, 2, *range(50, 100)]


def test_candidates_that_tie_across_blocks_of_pages(kernels) -> None:
    first = COUNT_BLOCK - 40
    log_mass = torch.full((COUNT_BLOCK + 6,), -20.0)
    log_mass[first:] = 0.0
    limits = Limits(4, candidates=5)
    assert chosen_of(kernels, log_mass, limits) == list(range(first, first + 4))
    log_mass[7] = 0.1
    assert chosen_of(kernels, log_mass, limits) == [7, *range(first, first + 3)]


@pytest.mark.parametrize(
    "limits",
    [Limits(40), Limits(40, wide=60), Limits(40, 40, top_p=0.9999), Limits(3, 3, 60, 0.9999)],
    ids=str,
)
def test_ranks_of_thirty_decades(kernels, limits: Limits) -> None:
    """The histogram tells ten decades apart; below these the bits of the ranks have to."""
    log_mass = -torch.linspace(69, 0, 100)
    assert chosen_of(kernels, log_mass, limits) == list(range(100 - limits.most, 100))


@pytest.mark.parametrize(
    "limits", [Limits(3), Limits(3, wide=90), Limits(3, 3, top_p=1.0)], ids=str
)
def test_one_page_has_nearly_all(kernels, limits: Limits) -> None:
    log_mass = torch.full((100,), -30.0)
    log_mass[7] = 0.0
    assert chosen_of(kernels, log_mass, limits) == [0, 1, 7]


def test_shares_too_small_for_a_float(kernels) -> None:
    """A page whose rank is 0 is not an empty one."""
    log_mass = torch.full((100,), -200.0)
    log_mass[7], log_mass[0] = 0.0, -torch.inf
    assert chosen_of(kernels, log_mass, Limits(4)) == [1, 2, 3, 7]
    assert chosen_of(kernels, log_mass, Limits(4, 2, top_p=0.5)) == [1, 7]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_choice_beside_a_much_wider_one(name: str) -> None:
    """The last page of one may rank far above that of the other."""
    log_mass = torch.linspace(-3, 3, 100)
    limits = Limits(20, wide=30)
    assert chosen_of(implementation(name), log_mass, limits) == list(range(80, 100))


@pytest.mark.parametrize("wanted", [least + more for least, _ in SAMPLES for more in (-1, 0)])
def test_a_sample_shows_where_the_candidates_begin(kernels, wanted: int) -> None:
    """And the finalists, a fourth of them."""
    random = torch.Generator().manual_seed(2)
    log_mass = torch.randn(1, 1, 1, 4 * wanted // 3, generator=random)
    is_empty = torch.rand(1, 1, log_mass.shape[3], generator=random) < 0.1
    selection = Selection(*kernels, log_mass, is_empty, Limits(40, candidates=wanted), spare=7)
    selection.rank()
    for stage, number in ((FIRST, wanted), (SECOND, wanted // 4)):
        bits, least = selection.stages[stage][0], int(selection.scratch.threshold[stage])
        assert 0.88 * number < sum(x >= least for x in bits) < 1.15 * number
    selection.select()
    selection.check_chosen()


def test_a_sample_has_one_page_of_each_block_wherever_it_is() -> None:
    pages = torch.arange(16 * 64)
    for every in (1, 4, 16):
        sampled = is_sampled(pages, every).view(64, 16)
        assert (sampled.sum(1) == 16 // every).all()
        assert (sampled.sum(0) == 64 // every).all()
