"""Checksums of rows and pages, against zlib."""

import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wavekv.kernels.crc32 import crc32_joined, crc32_pages, crc32_rows

COUNTS = st.integers(0, 40)
SIZES = st.one_of(st.integers(0, 70), st.sampled_from([255, 4096, 4097]))
SEEDS = st.integers(0, 2**31)


def random_bytes(*shape: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)


def expected(rows: Tensor) -> list[int]:
    return [zlib.crc32(row.numpy().tobytes()) for row in rows]


@given(COUNTS, SIZES, SEEDS)
def test_rows_have_the_checksums_of_zlib(count: int, nbytes: int, seed: int) -> None:
    rows = random_bytes(count, nbytes, seed=seed)
    assert crc32_rows(rows).tolist() == expected(rows)


@pytest.mark.parametrize("start", range(17))
def test_memory_may_begin_anywhere(start: int) -> None:
    memory = random_bytes(3 * 100 + start, seed=start)
    rows = memory[start:].view(3, 100)
    assert crc32_rows(rows).tolist() == expected(rows)


@given(st.integers(1, 5), st.integers(1, 8), st.integers(1, 70), SEEDS)
def test_pages_are_found_in_their_chunks(num: int, C: int, nbytes: int, seed: int) -> None:
    pages = random_bytes(num * C, nbytes, seed=seed)
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, num * C, (23,), generator=random)
    found = crc32_pages(list(pages.split(C)), ids, nbytes)
    assert found.tolist() == expected(pages[ids])


def test_pages_of_floats_are_their_bytes() -> None:
    chunks = list(torch.randn(2, 4, 2, 3, 5).bfloat16())
    pages = torch.stack(chunks).flatten(0, 1).flatten(1).view(torch.uint8)
    assert crc32_pages(chunks, torch.arange(8), 60).tolist() == expected(pages)


def test_many_rows_on_many_threads() -> None:
    rows = random_bytes(3000, 4096, seed=0)
    assert crc32_rows(rows).tolist() == expected(rows)


@given(COUNTS, SIZES, st.binary(max_size=40), SEEDS)
def test_joined_blocks_have_the_checksum_of_all_bytes(
    count: int, nbytes: int, before: bytes, seed: int
) -> None:
    rows = random_bytes(count, nbytes, seed=seed)
    found = crc32_joined(crc32_rows(rows), nbytes, zlib.crc32(before))
    assert found == zlib.crc32(before + rows.numpy().tobytes())


def test_nothing_joined_is_what_stood_before() -> None:
    assert crc32_joined(torch.empty(0, dtype=torch.int64), 4096, 0xDEADBEEF) == 0xDEADBEEF


@pytest.mark.parametrize("ids", [[-1], [0, 8], [2**40], [-(2**62)]])
def test_an_id_out_of_range_is_refused(ids: list[int]) -> None:
    chunks = [torch.zeros(4, 16, dtype=torch.uint8) for _ in range(2)]
    with pytest.raises(ValueError, match=r"ids must be in \[0, 8\)"):
        crc32_pages(chunks, torch.tensor(ids), 16)
    with pytest.raises(ValueError, match=r"ids must be in \[0, 0\)"):
        crc32_pages([], torch.tensor([0]), 16)


WRONG = {
    "rows are uint8": lambda: crc32_rows(torch.zeros(2, 3)),
    "rows are a matrix": lambda: crc32_rows(torch.zeros(3, dtype=torch.uint8)),
    "rows are contiguous": lambda: crc32_rows(torch.zeros(4, 6, dtype=torch.uint8)[:, :3]),
    "pages have their size": lambda: crc32_pages([torch.zeros(4, 3)], torch.tensor([0]), 11),
    "chunks are alike": lambda: crc32_pages(
        [torch.zeros(4, 3), torch.zeros(2, 3)], torch.tensor([0]), 12
    ),
    "ids are int64": lambda: crc32_pages([torch.zeros(4, 3)], torch.tensor([0.0]), 12),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_wrong_input_is_refused(call) -> None:
    with pytest.raises(ValueError, match="must"):
        call()
