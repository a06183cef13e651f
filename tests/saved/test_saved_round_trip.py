"""What is read is what was written."""

import os
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_cases import Content, example, expect_same, left_beside, random_tensor, read_all, same

from wavekv.errors import ClosedError, ContextFormatError, LayoutError
from wavekv.saved.arrays import rows_per_file
from wavekv.saved.dtypes import DTYPES
from wavekv.saved.reader import ContextReader
from wavekv.saved.writer import ContextWriter

DTYPE = st.sampled_from(list(DTYPES.values()))
SHAPE = st.lists(st.integers(0, 5), min_size=1, max_size=4)
INNER = st.lists(st.integers(1, 5), max_size=3)


def test_all_kinds_at_once(tmp_path: Path) -> None:
    content = example()
    manifest = content.save(tmp_path / "context", {"tokens": [1, 2], "name": "ü"})
    expect_same(read_all(tmp_path / "context"), content)
    with ContextReader.open(tmp_path / "context") as reader:
        assert reader.manifest == manifest
        assert reader.manifest.description == {"tokens": [1, 2], "name": "ü"}
        assert reader.verify() == []
    assert left_beside(tmp_path / "context") == []


@given(DTYPE, SHAPE, st.integers(0, 2**31))
def test_arrays(dtype: torch.dtype, shape: list[int], seed: int) -> None:
    content = Content({"a/b": random_tensor(dtype, *shape, seed=seed)})
    with TemporaryDirectory() as folder:
        content.save(Path(folder, "context"))
        expect_same(read_all(Path(folder, "context")), content)


@given(st.integers(0, 9), st.lists(st.tuples(DTYPE, INNER), min_size=1, max_size=4))
def test_tables(rows: int, columns: list[tuple[torch.dtype, list[int]]]) -> None:
    tensors = [random_tensor(dtype, rows, *inner) for dtype, inner in columns]
    content = Content(tables={"t": {str(i): tensor for i, tensor in enumerate(tensors)}})
    with TemporaryDirectory() as folder:
        content.save(Path(folder, "context"))
        expect_same(read_all(Path(folder, "context")), content)


@settings(max_examples=15)
@given(st.integers(0, 600), st.sampled_from([1, 16, 4096, 70000]), st.integers(0, 2**31))
def test_pages(count: int, page_bytes: int, seed: int) -> None:
    pages = random_tensor(torch.uint8, count, page_bytes, seed=seed)
    with TemporaryDirectory() as folder:
        path = Path(folder, "context")
        Content(pages={"p": pages}).save(path)
        expect_same(read_all(path), Content(pages={"p": pages}))
        with ContextReader.open(path) as reader:
            found = reader.pages("p")
            assert found.crc32.tolist() == [zlib.crc32(page.numpy().tobytes()) for page in pages]
            assert all(
                mapped.shape == (found.rows_per_file, page_bytes) and not mapped[rest:].any()
                for mapped, rest in zip(
                    found.map(),
                    range(count, -found.rows_per_file, -found.rows_per_file),
                    strict=False,
                )
                if rest < 0
            )
            assert reader.verify() == []


@given(st.integers(0, 10**8), st.integers(1, 10**6))
def test_files_of_pages_are_neither_small_nor_padded_much(count: int, page_bytes: int) -> None:
    rows = rows_per_file(count, page_bytes)
    total, file_bytes = count * page_bytes, rows * page_bytes
    assert rows & (rows - 1) == 0
    assert rows == 1 or file_bytes <= 64 << 20
    assert rows == 1 or -count % rows * page_bytes <= max(1 << 20, total // 64)
    # and not half as large as they may be, unless one file holds all
    assert rows >= count or 2 * file_bytes > min(max(1 << 20, total // 64), 64 << 20)


def test_pages_by_descriptors(tmp_path: Path) -> None:
    pages = random_tensor(torch.uint8, 700, 4096)
    Content(pages={"p": pages}).save(tmp_path / "context")
    with ContextReader.open(tmp_path / "context") as reader:
        found = reader.pages("p")
        assert len(found.files) == 3
        descriptors = found.open()
    try:
        page = os.pread(descriptors[300 // 256], 4096, 300 % 256 * 4096)
        assert page == pages[300].numpy().tobytes()
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def test_what_was_read_outlives_the_reader_and_stays_private(tmp_path: Path) -> None:
    example().save(tmp_path / "context")
    read = read_all(tmp_path / "context")
    for tensor in [
        *read.arrays.values(),
        *read.pages.values(),
        *read.tables["numbers"].values(),
    ]:
        tensor.zero_()
    expect_same(read_all(tmp_path / "context"), example())


def test_checked_files_are_not_read_again(tmp_path: Path, monkeypatch) -> None:
    example().save(tmp_path / "context")
    with ContextReader.open(tmp_path / "context") as reader:
        reader.check([*reader.arrays, *reader.tables])
        monkeypatch.setattr(os, "readv", lambda *arguments: pytest.fail("read again"))
        for name in reader.arrays:
            if name not in ("pages/0", "pages/1", "pages/2"):
                reader.array(name)
        for name in reader.tables:
            reader.table(name)


def test_a_context_of_nothing(tmp_path: Path) -> None:
    Content().save(tmp_path / "context")
    with ContextReader.open(tmp_path / "context") as reader:
        assert reader.arrays == reader.tables == reader.verify() == []


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    written: list[int] = []
    with ContextWriter(tmp_path / "context", written.append) as writer:
        example().write(writer)
        manifest = writer.commit({})
    assert sum(written) == manifest.nbytes + len(manifest.to_bytes())
    verified: list[int] = []
    with ContextReader.open(tmp_path / "context") as reader:
        reader.verify(verified.append)
    assert sum(verified) == manifest.nbytes


def test_a_path_that_is_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "context").symlink_to(tmp_path / "disk" / "context")
    for seed in range(2):
        example(seed).save(tmp_path / "context")
        expect_same(read_all(tmp_path / "context"), example(seed))
    assert (tmp_path / "context").is_symlink()
    assert left_beside(tmp_path / "disk" / "context") == []


def test_non_contiguous_tensors(tmp_path: Path) -> None:
    tensor = torch.randn(4, 6)[:, ::2]
    Content({"a": tensor}, {"t": {"c": tensor.T}}).save(tmp_path / "context")
    with ContextReader.open(tmp_path / "context") as reader:
        assert same(reader.array("a"), tensor)
        assert same(reader.table("t")["c"], tensor.T)


@pytest.mark.gpu
def test_tensors_of_a_device(tmp_path: Path) -> None:
    tensor = torch.randn(4, 6)
    Content({"a": tensor.cuda()}, {"t": {"c": tensor.cuda()}}).save(tmp_path / "context")
    with ContextReader.open(tmp_path / "context") as reader:
        assert same(reader.array("a"), tensor)
        assert same(reader.table("t")["c"], tensor)


one = torch.ones(2)
REFUSED = {
    "a scalar": lambda w: w.array("a", torch.tensor(1.0)),
    "a type": lambda w: w.array("a", torch.ones(2, dtype=torch.complex64)),
    "a type of pages": lambda w: w.pages("a", 1, (1,), torch.float64, reads_ones),
    "a type of columns": lambda w: w.table("a", {"c": torch.ones(2, dtype=torch.float64)}),
    "a way out": lambda w: w.array("../a", one),
    "an absolute name": lambda w: w.array("/a", one),
    "an empty name": lambda w: w.array("", one),
    "a hidden name": lambda w: w.array(".a", one),
    "the manifest": lambda w: w.array("manifest.json/a/../..", one),
    "metadata": lambda w: w.array("zarr.json", one),
    "tables": lambda w: w.array("tables/a", one),
    "a table of two parts": lambda w: w.table("a/b", {"c": one}),
    "a table that leads out": lambda w: w.table("../a", {"c": one}),
    "an array twice": lambda w: [w.array("a", one), w.array("a", one)],
    "a table twice": lambda w: [w.table("a", {"c": one}), w.table("a", {"c": one})],
    "an array in an array": lambda w: [w.array("a", one), w.array("a/b", one)],
    "an array around an array": lambda w: [w.array("a/b", one), w.array("a", one)],
    "pages with a table's name": lambda w: [
        w.table("a_b", {"c": one}),
        w.pages("a/b", 1, (1,), torch.float32, reads_ones),
    ],
    "no columns": lambda w: w.table("a", {}),
    "a column of no rows": lambda w: w.table("a", {"c": torch.tensor(1.0)}),
    "columns of two lengths": lambda w: w.table("a", {"c": one, "d": torch.ones(3)}),
    "an inner dimension of 0": lambda w: w.table("a", {"c": torch.ones(2, 0)}),
    "pages of no bytes": lambda w: w.pages("a", 1, (0,), torch.float32, reads_ones),
    "other pages": lambda w: w.pages("a", 1, (2,), torch.float32, reads_ones),
    "pages of another type": lambda w: w.pages("a", 1, (1,), torch.int32, reads_ones),
}


def reads_ones(first: int, last: int) -> torch.Tensor:
    return torch.ones(last - first, 1)


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_what_the_format_does_not_hold_is_refused(tmp_path: Path, call) -> None:
    with pytest.raises(LayoutError, match=r"expected .*, got"), ContextWriter(tmp_path / "c") as w:
        call(w)
    assert list(tmp_path.iterdir()) == []


def test_what_json_does_not_hold_is_refused(tmp_path: Path) -> None:
    for description in ({"a": float("nan")}, {"a": {1, 2}}):
        with pytest.raises((TypeError, ValueError)), ContextWriter(tmp_path / "c") as writer:
            writer.commit(description)
    assert list(tmp_path.iterdir()) == []


def test_numbers_as_keys_are_text_when_read(tmp_path: Path) -> None:
    Content().save(tmp_path / "c", {9: "a", 10: ("b",)})
    with ContextReader.open(tmp_path / "c") as reader:
        assert reader.manifest.description == {"9": "a", "10": ["b"]}


def test_use_after_the_end_is_refused(tmp_path: Path) -> None:
    with ContextWriter(tmp_path / "c") as writer:
        writer.commit({})
        with pytest.raises(ClosedError, match="after commit"):
            writer.array("a", one)
    with pytest.raises(ClosedError):
        writer.commit({})
    reader = ContextReader.open(tmp_path / "c")
    reader.close()
    with pytest.raises(ClosedError, match="open the context again"):
        reader.verify()


def test_names_that_are_not_there_are_said(tmp_path: Path) -> None:
    example().save(tmp_path / "c")
    with ContextReader.open(tmp_path / "c") as reader:
        for call in (reader.array, reader.table, reader.pages, lambda name: reader.check([name])):
            with pytest.raises(ContextFormatError, match=r"expected .*nothing.* got none"):
                call("nothing")
        with pytest.raises(ContextFormatError, match="read it as pages"):
            reader.array("pages/0")
        with pytest.raises(ContextFormatError, match="power of two"):
            reader.pages("types/float32")
