"""Ranks, the pages chosen by them, and codes of candidates: against a sort, and against the
reference."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_model import IMPLEMENTATIONS, UNWRITTEN, implementation
from step_cases import Case, make_case
from torch import Tensor

from wavekv.kernels import reference, step_reference
from wavekv.kernels.step import (
    BIN_SHIFT,
    CANDIDATES,
    LEAST,
    MOST,
    SAMPLED_PAGES,
    WIDE,
    StepPages,
    StepShape,
    StepSteady,
    bin_base,
    empty_scratch,
)

D = 8
CLOSE = 1e-5
"""Shares are sums in float32: where top_p falls this close to one, either choice is right."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors are small here: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Limits(NamedTuple):
    """How many pages to choose."""

    most: int
    least: int = 1
    wide: int = 0
    """0: as many as the most, and no wide choice."""
    top_p: float | None = None
    candidates: int = 0


class Selection:
    """The kernels of a step from the scores to the chosen pages, on log masses that are given.

    A head's query is a unit vector, and the mean of a page holds its log mass for each head of the
    group; of a page without tokens it is -inf for all."""

    def __init__(
        self,
        ops: ModuleType,
        device: str,
        log_mass: Tensor,
        is_empty: Tensor,
        limits: Limits,
        spare: int = 0,
    ) -> None:
        """log_mass: [B, Hkv, G, n]; is_empty: [B, Hkv, n] bool."""
        B, H, G, n = log_mass.shape
        assert G <= D
        N = n + spare
        self.ops, self.num_pages, self.limits = ops, n, limits
        self.log_mass = log_mass.masked_fill(is_empty.unsqueeze(2), -torch.inf)
        most = min(limits.most, N)
        self.shape = StepShape(
            batch=B,
            kv_heads=H,
            group=G,
            head_dim=D,
            page_size=1,
            capacity=N,
            most=most,
            slots=most,
            misses=most,
            sinks=0,
            ring=8,
            span_pages=16,
            scale=1.0,
            top_p=limits.top_p,
            tail="first",
            is_wide=limits.wide > 0,
        )
        values = torch.zeros(4, dtype=torch.int32)
        values[LEAST], values[MOST] = limits.least, most
        values[WIDE], values[CANDIDATES] = limits.wide or most, limits.candidates
        self.values = values.to(device)
        self.counters = torch.tensor([8, 8, n, 0], dtype=torch.int32, device=device)
        self.query = torch.eye(D, device=device)[:G].repeat(B, H, 1)
        # what is beyond the pages in use, or belongs to an empty one, must not matter
        mean, counts = torch.full((B, H, N, D), torch.nan), torch.full((B, H, N), 77)
        masses = torch.nn.functional.pad(log_mass.mT, (0, D - G))
        mean[:, :, :n] = masses.masked_fill(is_empty.unsqueeze(3), torch.nan)
        counts[..., :n] = (~is_empty).int()
        pages = StepPages(
            counts.int(),
            mean,
            torch.full((B, H, N), torch.nan),
            mean,
            torch.zeros(B, H, N, 1, 1, 4, dtype=torch.uint8),
            torch.zeros(B, H, N, 1, dtype=torch.uint8),
            torch.zeros(B, H, N),
            torch.zeros(B, H, 1, 2, D, D),
            torch.zeros(B, H, N, dtype=torch.int64),
        )
        self.pages = StepPages(*(part.to(device) for part in pages))
        zone = torch.zeros(B, H, 8, D, device=device)
        self.steady = StepSteady(zone, zone, torch.zeros(B, 8, dtype=torch.bool, device=device))
        scratch = empty_scratch(self.shape, torch.float32, torch.device(device))
        for part in scratch:
            if part.dtype.is_floating_point:
                part.fill_(torch.nan)
            elif part.dtype in (torch.int32, torch.int64):
                part.fill_(UNWRITTEN)
        scratch.attended.fill_(1)
        self.narrow_memory, narrow = guarded(B, H, self.shape.most, n, device)
        self.wide_memory, self.wide = guarded(B, H, limits.wide, n, device)
        self.scratch = scratch._replace(chosen=narrow)

    def rank(self) -> None:
        """Up to the final ranks. Candidates have codes that say nothing new."""
        shape, scratch = self.shape, self.scratch
        self.ops.score(
            self.query, None, None, None, self.steady, self.pages, self.counters, scratch, shape
        )
        self.ops.rank_pages(self.counters, self.values, scratch, shape, is_final=False)
        self.first_bits = self.bits()
        self.ops.refine(self.query, self.pages, self.counters, scratch, shape)
        self.ops.rank_pages(self.counters, self.values, scratch, shape, is_final=True)

    def select(self) -> None:
        self.ops.select(self.counters, self.values, self.scratch, self.shape)
        if self.limits.wide:
            self.ops.pick(
                self.counters, self.values, self.scratch, self.wide, self.shape, wide=True
            )

    def bits(self) -> list[list[int]]:
        """[rows, n] ranks of pages in use."""
        bits: list[list[int]] = self.scratch.rank[..., : self.num_pages].flatten(0, 1).tolist()
        return bits

    def check_ranks(self) -> None:
        """Both rankings, and what they say is worth a look."""
        expected = expected_ranks(self.log_mass)
        bins_from = bin_base(self.shape.group)
        wanted = (self.limits.candidates, int(self.values[WIDE]))
        needless = not self.limits.candidates or self.shape.most >= self.num_pages
        for number, every in enumerate((self.first_bits, self.bits())):
            thresholds = self.scratch.threshold[number].flatten().tolist()
            for bits, ranks, least in zip(every, expected, thresholds, strict=True):
                assert [x < 0 for x in bits] == [x < 0 for x in ranks.tolist()]
                assert all(x >= -1 for x in bits)
                found = np.array(bits, dtype=np.int32).clip(0).view(np.float32)
                np.testing.assert_allclose(found, ranks.clip(0), rtol=1e-4, atol=1e-36)
                if number == 0 and needless:
                    assert least == 0x7FFFFFFF
                    continue
                # the bin of the last one wanted, whole; of the lowest bin all
                alive = [x for x in bits if x >= 0]
                assert sum(x >= least for x in alive) >= min(wanted[number], len(alive))
                assert least == 0 or least & ((1 << BIN_SHIFT) - 1) == 0
                if number == 1 and not needless and self.ops is not step_reference:
                    # only pages that were candidates are counted: the bin may be a lower one
                    continue
                bin_end = (bins_from + 1 if least == 0 else (least >> BIN_SHIFT) + 1) << BIN_SHIFT
                assert sum(x >= bin_end for x in alive) < wanted[number]

    def check_chosen(self) -> None:
        """What is chosen is what a sort by rank would choose."""
        assert not self.scratch.attended[..., : self.num_pages].any()
        top_p, limits, G = self.limits.top_p, self.limits, self.shape.group
        narrow = unguarded(self.narrow_memory, self.scratch.chosen)
        wide = unguarded(self.wide_memory, self.wide)
        for bits, few, many in zip(self.bits(), narrow, wide, strict=True):
            # of equal ranks the lower page goes first
            order = [n for _, n in sorted((-x, n) for n, x in enumerate(bits) if x >= 0)]
            best = order[: self.shape.most]
            fewest = len(best)
            if top_p is not None:
                shares = np.array([bits[n] for n in best], dtype=np.int32).view(np.float32)
                before = np.cumsum(shares.astype(np.float64)) - shares
                fewest, most = (
                    max(int((before < top_p * G + close * G).sum()), min(limits.least, len(best)))
                    for close in (-CLOSE, CLOSE)
                )
                best = best[:most]
            count = sum(page >= 0 for page in few)
            assert fewest <= count <= len(best)
            assert few == sorted(best[:count]) + [-1] * (len(few) - count)
            if limits.wide:
                best = sorted(order[: limits.wide])
                assert many == best + [-1] * (len(many) - len(best))
                assert set(few) <= {-1, *best}


def guarded(B: int, H: int, M: int, spare: int, device: str) -> tuple[Tensor, Tensor]:
    """Memory, and a view [B, Hkv, M] of its middle."""
    memory = torch.full((spare + B * H * M + spare,), UNWRITTEN, dtype=torch.int32, device=device)
    return memory, memory[spare : spare + B * H * M].view(B, H, M)


def unguarded(memory: Tensor, chosen: Tensor) -> list[list[int]]:
    """The chosen pages of each row, if nothing was written beside them."""
    spare = (len(memory) - chosen.numel()) // 2
    assert (memory[:spare] == UNWRITTEN).all()
    assert (memory[len(memory) - spare :] == UNWRITTEN).all()
    rows: list[list[int]] = chosen.flatten(0, 1).tolist()
    return rows


def expected_ranks(log_mass: Tensor) -> np.ndarray:
    """[rows, n] float64: the sum of the shares that heads of a group give; -1 for empty pages."""
    mass = log_mass.flatten(0, 1).double().numpy()
    if mass.shape[2] == 0:
        return np.zeros((mass.shape[0], 0))
    largest = mass.max(2, keepdims=True)
    weights = np.exp(mass - np.where(np.isinf(largest), 0.0, largest))
    ranks = (weights / np.maximum(weights.sum(2, keepdims=True), 1e-300)).sum(1)
    return np.where(np.isinf(mass).all(1), -1.0, ranks)


def check_selection(selection: Selection) -> None:
    selection.rank()
    selection.check_ranks()
    selection.select()
    selection.check_chosen()


KINDS = ["equal", "grid", "close", "normal", "sharp", "decades", "one of all", "few of all"]


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
    if is_slow:
        limits = limits._replace(candidates=min(limits.candidates, 40))
        if n > 300:
            # the fewer are chosen, the more blocks has a list of equal ranks
            limits = limits._replace(most=max(limits.most, 64))
    if data.draw(st.booleans()):
        limits = limits._replace(wide=max(limits.most, int(1.5 * min(limits.most, n))))
    kind, empty = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(EMPTY))
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


@pytest.fixture(params=IMPLEMENTATIONS)
def kernels(request: pytest.FixtureRequest) -> tuple[ModuleType, str]:
    return implementation(request.param)


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


@pytest.mark.parametrize("num_pages", [SAMPLED_PAGES - 1, SAMPLED_PAGES, SAMPLED_PAGES + 500])
def test_a_sample_shows_where_the_candidates_begin(kernels, num_pages: int) -> None:
    random = torch.Generator().manual_seed(2)
    log_mass = torch.randn(1, 1, 1, num_pages, generator=random)
    is_empty = torch.rand(1, 1, num_pages, generator=random) < 0.1
    selection = Selection(*kernels, log_mass, is_empty, Limits(40, candidates=400), spare=7)
    selection.rank()
    bits, least = selection.first_bits[0], int(selection.scratch.threshold[0])
    assert 330 <= sum(x >= least for x in bits) <= 480
    selection.select()
    selection.check_chosen()


# ---- codes of candidates ----


def refined(ops: ModuleType, case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Score, rank and refine. Returns log mass and shift by moments and after codes [B, Hq, n], and
    which pages are candidates [B, Hkv, n]."""
    c, n = case, int(case.counters[2])
    ops.score(c.query, None, None, None, c.steady, c.pages, c.counters, c.scratch, c.shape)
    log_mass, shift = (x[..., :n].clone() for x in (c.scratch.log_mass, c.scratch.shift))
    ops.rank_pages(c.counters, c.limits, c.scratch, c.shape, is_final=False)
    is_candidate = c.scratch.rank[..., :n] >= c.scratch.threshold[0].unsqueeze(-1)
    ops.refine(c.query, c.pages, c.counters, c.scratch, c.shape)
    return log_mass, shift, c.scratch.log_mass[..., :n], c.scratch.shift[..., :n], is_candidate


def of_codes(case: Case, b: int, h: int, page: int) -> tuple[np.ndarray, np.ndarray]:
    """Log mass and shift [G] of a page from the codes of its keys, in float64 and one by one."""
    shape, G = case.shape, case.shape.group
    count = int(case.pages.counts[b, h, page])
    codes = case.pages.codes[b, h, page].cpu().numpy()
    half = 4 * codes.shape[0]
    mean = case.pages.mean[b, h, page].cpu().double().numpy()
    page_scale = float(case.pages.page_scale[b, h, page])
    masses, shifts = np.zeros(G), np.zeros(G)
    for g in range(G):
        query = case.query[b, h * G + g].cpu().double().numpy() * shape.scale
        step = np.abs(query).max() / 127
        rounded = np.round(query / step) * step
        offsets = []
        for p in range(count):
            offset = 0.0
            for d in range(shape.head_dim):
                byte = int(codes[(d % half) // 4, p, d % 4])
                nibble = byte & 15 if d < half else byte >> 4
                offset += rounded[d] * (nibble - 8)
            offsets.append(offset * page_scale * int(case.pages.code_scale[b, h, page, p]) / 255)
        offset = np.array(offsets) - np.mean(offsets)
        logits = offset + query @ mean
        if shape.softcap is not None:
            logits = shape.softcap * np.tanh(logits / shape.softcap)
        masses[g] = np.logaddexp.reduce(logits)
        shifts[g] = (np.exp(logits - masses[g]) * offset).sum()
    return masses, shifts


def code_case(device: str, seed: int, num_pages: int, spare: int, **chosen: Any) -> Case:
    """Pages of all sizes, and a query no component of which is rounded by chance."""
    case = make_case(
        seed,
        num_pages=num_pages,
        capacity=num_pages + spare,
        most=3,
        least=1,
        slots=3,
        misses=3,
        sinks=0,
        ring=8,
        device=device,
        **chosen,
    )
    random = torch.Generator().manual_seed(1)
    steps = torch.randint(-126, 127, case.query.shape, generator=random).float()
    steps += 0.8 * torch.rand(case.query.shape, generator=random) - 0.4
    steps[..., 3] = 127
    case.query.copy_(steps / 60)
    return case


def check_refined(ops: ModuleType, case: Case, by_hand: int) -> None:
    c, n = case, int(case.counters[2])
    log_mass, shift, mass, lean, is_candidate = refined(ops, case)
    variance = c.pages.variance[:, :, :n] if c.shape.tail == "second" else None
    moments = reference.score(
        c.query,
        c.pages.mean[:, :, :n],
        variance,
        c.pages.counts[:, :, :n],
        scale=c.shape.scale,
        softcap=c.shape.softcap,
    )
    for ours, theirs in zip((log_mass, shift), moments, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    # as a list of pages, -1 for the rest
    ids = torch.arange(n, device=mass.device).expand_as(is_candidate)
    candidates = ids.masked_fill(~is_candidate, -1).sort(dim=-1, descending=True).values
    expected = reference.refine(
        c.query,
        c.query,
        log_mass,
        shift,
        c.pages.mean[:, :, :n],
        c.pages.codes[:, :, :n],
        c.pages.code_scale[:, :, :n],
        c.pages.page_scale[:, :, :n],
        c.pages.counts[:, :, :n],
        candidates,
        scale=c.shape.scale,
        softcap=c.shape.softcap,
    )
    for ours, theirs in zip((mass, lean), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    others = ~is_candidate.repeat_interleave(c.shape.group, 1)
    for ours, before in zip((mass, lean), (log_mass, shift), strict=True):
        assert torch.equal(ours[others], before[others])
    is_empty = c.pages.counts[:, :, :n] <= 0
    assert not (is_candidate & is_empty).any()
    assert (mass[is_empty.repeat_interleave(c.shape.group, 1)] == -torch.inf).all()
    if int(c.limits[CANDIDATES]) and n > c.shape.most:
        wanted = (~is_empty).sum(-1).clamp(max=int(c.limits[CANDIDATES]))
        assert (is_candidate.sum(-1) >= wanted).all()
    else:
        assert not is_candidate.any()
    G = c.shape.group
    for b, h, page in is_candidate.nonzero().tolist()[:by_hand]:
        found = (x[b, h * G : (h + 1) * G, page].cpu().double().numpy() for x in (mass, lean))
        for ours, theirs in zip(found, of_codes(c, b, h, page), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def code_cases(sizes: st.SearchStrategy[int]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**20),
            "num_pages": sizes,
            "spare": st.sampled_from([0, 1, 9]),
            "batch": st.integers(1, 2),
            "kv_heads": st.integers(1, 2),
            "group": st.integers(1, 7),
            "head_dim": st.sampled_from([8, 24, 80, 128]),
            "page_size": st.sampled_from([1, 2, 4, 8, 16]),
            "candidates": st.sampled_from([0, 1, 5, 40]),
            "softcap": st.sampled_from([None, 5.0]),
            "tail": st.sampled_from(["first", "second"]),
            "spread": st.sampled_from([0.1, 1.0, 4.0]),
        }
    )


@settings(max_examples=60)
@given(chosen=code_cases(st.integers(1, 40)))
def test_twin_refines_as_the_reference(chosen: dict[str, Any]) -> None:
    check_refined(step_reference, code_case("cpu", **chosen), by_hand=2)


@settings(max_examples=6)
@given(chosen=code_cases(st.sampled_from([1, 20, 66])))
def test_kernels_refine_as_the_reference(chosen: dict[str, Any]) -> None:
    ops, device = implementation("triton")
    check_refined(ops, code_case(device, **chosen), by_hand=1)


@pytest.mark.parametrize(
    ("group", "head_dim", "page_size"),
    [(1, 128, 16), (2, 24, 2), (3, 8, 1), (4, 80, 4), (5, 8, 8), (6, 24, 16), (7, 80, 1)],
)
def test_kernels_refine_every_head_of_a_group(group: int, head_dim: int, page_size: int) -> None:
    ops, device = implementation("triton")
    case = code_case(
        device, group, 50, 3, group=group, head_dim=head_dim, page_size=page_size, candidates=20
    )
    check_refined(ops, case, by_hand=3)
