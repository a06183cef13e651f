"""Rows of files reach the memory that they are wanted in, with the checksums of zlib."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavekv.errors import ContextFormatError
from wavekv.kvstore.page_file import PageFile

NUM_FILES, ROWS = 3, 8


@pytest.fixture
def folder() -> Iterator[Path]:
    with TemporaryDirectory() as name:
        yield Path(name)


def make_file(folder: Path, page_bytes: int) -> tuple[PageFile, np.ndarray]:
    """Random rows [NUM_FILES * ROWS, page_bytes] in files."""
    rows = np.random.default_rng(0).integers(0, 256, (NUM_FILES * ROWS, page_bytes), dtype=np.uint8)
    names = [str(folder / str(number)) for number in range(NUM_FILES)]
    for name, part in zip(names, np.split(rows, NUM_FILES), strict=True):
        Path(name).write_bytes(part.tobytes())
    descriptors = [os.open(name, os.O_RDONLY) for name in names]
    return PageFile(descriptors, names, rows_per_file=ROWS, page_bytes=page_bytes), rows


def places_in(memory: np.ndarray, slots: list[int]) -> np.ndarray:
    return memory.ctypes.data + np.array(slots, dtype=np.int64) * memory.shape[1]


# 300 000: four rows are more than one call takes
@given(
    page_bytes=st.sampled_from([1, 24, 4096, 300_000]),
    wanted=st.lists(st.integers(0, NUM_FILES * ROWS - 1), max_size=60),
    data=st.data(),
)
def test_rows_in_any_order_go_anywhere(
    page_bytes: int, wanted: list[int], data: st.DataObject
) -> None:
    # in a row, as most pages are, or not
    orders = st.one_of(st.just(range(len(wanted))), st.permutations(range(len(wanted))))
    slots = data.draw(orders, "slots")
    with TemporaryDirectory() as name:
        file, rows = make_file(Path(name), page_bytes)
        memory = np.zeros((len(wanted), page_bytes), dtype=np.uint8)
        crc32 = file.read(np.array(wanted, dtype=np.int64), places_in(memory, list(slots)))
        file.close()
    assert np.array_equal(memory[list(slots)], rows[wanted])
    assert crc32.tolist() == [zlib.crc32(rows[row]) for row in wanted]


def test_a_file_that_ends_early_is_named(folder: Path) -> None:
    file, rows = make_file(folder, 24)
    os.truncate(folder / "1", 24 * 4)
    memory = np.zeros((NUM_FILES * ROWS, 24), dtype=np.uint8)
    every = np.arange(NUM_FILES * ROWS)
    with pytest.raises(ContextFormatError, match=r"/1, got 0; the file is cut short"):
        file.read(every, places_in(memory, every.tolist()))
    # what is before the end can still be read
    crc32 = file.read(every[: ROWS + 4], places_in(memory, every[: ROWS + 4].tolist()))
    assert crc32.tolist() == [zlib.crc32(row) for row in rows[: ROWS + 4]]
    file.close()


def test_what_the_system_refuses_is_its_error() -> None:
    file = PageFile([1 << 20], ["nowhere"], rows_per_file=1 << 40, page_bytes=24)
    memory = np.zeros((2, 24), dtype=np.uint8)
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.read(np.array([5, 3]), places_in(memory, [0, 1]))
