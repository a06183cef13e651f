"""Choosing a backend, rejecting wrong arguments, threads."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from wavekv import kernels
from wavekv.kernels import use_backend

QUERY = torch.zeros(1, 4, 8)
PAGES = torch.zeros(1, 2, 5, 8)
COUNTS = torch.ones(1, 2, 5, dtype=torch.int32)
IDS = torch.zeros(1, 2, 5, dtype=torch.int64)
CHUNK = torch.zeros(3, 2, 4, 8)


def test_numba_loads_on_first_use_and_leaves_the_threads_of_torch_alone() -> None:
    program = """
import sys, torch
from wavekv.kernels import merge_state, use_backend
state = torch.zeros(2, 4), torch.zeros(2)
with use_backend("torch"):
    merge_state(*state, *state)
assert "numba" not in sys.modules
torch.set_num_threads(1)
merge_state(*state, *state)
assert "numba" in sys.modules
# numba's OpenMP layer shares libgomp with torch
assert torch.get_num_threads() == 1
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_use_backend_nests_and_is_undone() -> None:
    calls = torch.full((1, 4), torch.nan), torch.zeros(1)
    with use_backend("numba"), use_backend("torch"):
        kernels.merge_state(*calls, *calls)
    with pytest.raises(ValueError, match="got 'fast'"), use_backend("fast"):
        pass


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("attend_pages", (QUERY, [CHUNK], IDS.int(), COUNTS), r"page_ids must be .*int64"),
        ("attend_pages", (QUERY, [], IDS, COUNTS), r"at least one chunk"),
        ("attend_pages", (QUERY, [CHUNK, CHUNK[:2]], IDS, COUNTS), r"chunks must all be"),
        ("attend_pages", (QUERY, [CHUNK[..., :4]], IDS, COUNTS), r"chunks must be \[C, 2, P, 8\]"),
        ("attend_pages", (QUERY, [CHUNK[:, :, ::2]], IDS, COUNTS), r"chunks must be contiguous"),
        ("attend_dense", (QUERY[0], PAGES, PAGES, None), r"query must be .* got \(4, 8\)"),
        ("attend_dense", (QUERY[:, :3], PAGES, PAGES, None), r"a multiple of Hkv=2"),
        ("attend_dense", (QUERY, PAGES.double(), PAGES, None), r"keys must be .* got .*float64"),
        ("attend_dense", (QUERY, PAGES.mT.contiguous().mT, PAGES, None), r"contiguous last"),
        ("attend_dense", (QUERY, PAGES, PAGES[:, :1], None), r"values must be \(1, 2, 5, 8\)"),
        ("attend_dense", (QUERY, PAGES, PAGES, torch.ones(1, 5)), r"valid must be .*bool"),
    ],
)
def test_wrong_tensors_are_named(name: str, arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(kernels, name)(*arguments, scale=1.0)


def test_wrong_numbers_are_named() -> None:
    masses = torch.zeros(1, 4, 5)
    with pytest.raises(ValueError, match="softcap must be positive"):
        kernels.attend_dense(QUERY, PAGES, PAGES, None, scale=1.0, softcap=0.0)
    with pytest.raises(ValueError, match="min_pages <= max_pages, got 3 and 2"):
        kernels.select(masses, 2, max_pages=2, min_pages=3)
    with pytest.raises(ValueError, match="top_p must be in"):
        kernels.select(masses, 2, max_pages=2, top_p=1.5)
    with pytest.raises(ValueError, match="a multiple of Hkv=3"):
        kernels.select(masses, 3, max_pages=2)
    with pytest.raises(ValueError, match="states must be"):
        kernels.merge_state(QUERY, QUERY[..., 0], QUERY, QUERY[0, :, 0])


def test_numba_refuses_other_devices() -> None:
    state = torch.zeros(2, 4, device="meta"), torch.zeros(2, device="meta")
    with use_backend("numba"), pytest.raises(ValueError, match=r"needs CPU tensors, got .* meta"):
        kernels.merge_state(*state, *state)
    with pytest.raises(ValueError, match="on one device"):
        kernels.merge_state(*state, torch.zeros(2, 4), torch.zeros(2))


def test_many_threads_and_any_number_of_threads_give_the_same_bits() -> None:
    query, (keys, values) = torch.randn(1, 4, 64), torch.randn(2, 1, 1, 3000, 64)

    def attend(_: int) -> torch.Tensor:
        return kernels.attend_dense(query, keys, values, None, scale=0.125)[0]

    expected = attend(0)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(out, expected) for out in pool.map(attend, range(16)))
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(attend(0), expected)
    finally:
        torch.set_num_threads(before)
