"""Reading vectors from files, and writing what a search found."""

import io

import numpy as np
import pytest

from wavekv.cli.arrays import expect_writable, read_vectors, write_found
from wavekv.errors import InputError

KEYS = np.arange(24, dtype=np.float32).reshape(6, 4)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_npy_of_two_and_three_dimensions_is_mapped(folder) -> None:
    np.save("keys.npy", KEYS)
    np.save("heads.npy", KEYS.reshape(2, 3, 4))
    assert isinstance(read_vectors("keys.npy"), np.memmap)
    np.testing.assert_array_equal(read_vectors("keys.npy"), KEYS)
    np.testing.assert_array_equal(read_vectors("heads.npy"), KEYS.reshape(2, 3, 4))


def test_an_npy_without_rows(folder) -> None:
    np.save("none.npy", KEYS[:0])
    assert read_vectors("none.npy").shape == (0, 4)


def test_npz_by_name_and_the_only_one(folder) -> None:
    np.savez("one.npz", keys=KEYS)
    np.savez("two.npz", keys=KEYS, queries=KEYS[:2])
    np.testing.assert_array_equal(read_vectors("one.npz"), KEYS)
    np.testing.assert_array_equal(read_vectors("two.npz:queries"), KEYS[:2])


def test_a_path_may_hold_a_colon(folder) -> None:
    np.savez("a:b.npz", keys=KEYS)
    np.save("a.npz:b.npy", KEYS)
    np.testing.assert_array_equal(read_vectors("a:b.npz"), KEYS)
    np.testing.assert_array_equal(read_vectors("a:b.npz:keys"), KEYS)
    np.testing.assert_array_equal(read_vectors("a.npz:b.npy"), KEYS)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("two.npz", r"two.npz to hold one array, got keys, queries; name one as two.npz:NAME"),
        ("two.npz:values", "to hold 'values', got keys, queries"),
        ("flat.npy", r"flat.npy to hold \[N, D\] or \[H, N, D\], got \(24,\)"),
        ("text.npy", "text.npy to begin with .*NUMPY.*, got b'hello'"),
        ("text.npz", "text.npz to begin with b'PK', got b'he'"),
        ("empty.npy", "got b''"),
        ("cut.npy", "cut.npy as NumPy saved it"),
        ("cut.npz", "cut.npz as NumPy saved it"),
        ("objects.npy", "objects.npy as NumPy saved it"),
        ("keys.txt", "ends in one of .npy, .npz, .arrow, .feather, .parquet, got keys.txt"),
    ],
)
def test_what_cannot_be_read_is_an_input_error(folder, source, message) -> None:
    np.savez("two.npz", keys=KEYS, queries=KEYS[:2])
    np.save("flat.npy", KEYS.reshape(-1))
    np.save("objects.npy", np.array([[None]]), allow_pickle=True)
    for name in ("text.npy", "text.npz", "keys.txt"):
        (folder / name).write_text("hello")
    (folder / "empty.npy").touch()
    whole = io.BytesIO()
    np.save(whole, KEYS)
    (folder / "cut.npy").write_bytes(whole.getvalue()[:-8])
    (folder / "cut.npz").write_bytes((folder / "two.npz").read_bytes()[:100])
    with pytest.raises(InputError, match=message):
        read_vectors(source)


@pytest.mark.parametrize("source", ["none.npy", "none.npz:keys"])
def test_a_missing_file_is_an_os_error(folder, source) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.np"):
        read_vectors(source)


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (0, 3)])
def test_found_arrays_come_back_from_npz(folder, shape) -> None:
    ids, scores = np.ones(shape, np.int64), np.ones(shape, np.float32)
    write_found(folder / "found.npz", ids, scores)
    with np.load("found.npz") as found:
        np.testing.assert_array_equal(found["ids"], ids)
        np.testing.assert_array_equal(found["scores"], scores)
        assert found["scores"].dtype == np.float32


def test_outputs_are_checked_before_the_work(folder) -> None:
    with pytest.raises(InputError, match=r"ends in one of .npz, .arrow, .feather, got a\.csv"):
        expect_writable(folder.joinpath("a.csv").relative_to(folder))
    with pytest.raises(FileNotFoundError, match=r"a folder to write a\.npz to"):
        expect_writable(folder / "none" / "a.npz")


def vectors(pa, array, kind=None):
    """A column of an array [N, D]."""
    flat = pa.array(array.reshape(-1), type=kind)
    return pa.FixedSizeListArray.from_arrays(flat, array.shape[1])


def save_table(pa, table, name: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow.parquet").write_table(table, name)
        return
    new = pa.ipc.new_stream if name.startswith("stream") else pa.ipc.new_file
    with open(name, "wb") as file, new(file, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=4):
            writer.write_batch(batch)


@pytest.mark.parametrize("name", ["file.arrow", "stream.arrow", "file.feather", "file.parquet"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_columns_of_tables(folder, name, dtype) -> None:
    pa = pytest.importorskip("pyarrow")
    keys = KEYS.astype(dtype)
    save_table(pa, pa.table({"id": range(6), "keys": vectors(pa, keys)}), name)
    for source in (name, f"{name}:keys"):
        read = read_vectors(source)
        assert read.dtype == dtype
        np.testing.assert_array_equal(read, keys)


def test_a_slice_of_a_table(folder) -> None:
    pa = pytest.importorskip("pyarrow")
    save_table(pa, pa.table({"keys": vectors(pa, KEYS)}).slice(2, 3), "part.arrow")
    np.testing.assert_array_equal(read_vectors("part.arrow"), KEYS[2:5])


def test_a_table_without_rows(folder) -> None:
    pa = pytest.importorskip("pyarrow")
    save_table(pa, pa.table({"keys": vectors(pa, KEYS)}).slice(0, 0), "none.arrow")
    assert read_vectors("none.arrow").shape == (0, 4)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("file.arrow", r"one column of vectors, got a, b; name one as file.arrow:NAME"),
        ("file.arrow:c", "to hold 'c', got id, a, b, wide, holes"),
        ("file.arrow:id", "column 'id' .* FixedSizeList<float32 or float16>, got int64"),
        ("file.arrow:wide", "FixedSizeList<float32 or float16>, got fixed_size_list<.*double"),
        ("file.arrow:holes", "column 'holes' of file.arrow without nulls"),
        ("text.arrow", "text.arrow to be an Arrow or Parquet file"),
        ("text.parquet", "text.parquet to be an Arrow or Parquet file"),
    ],
)
def test_bad_tables_are_input_errors(folder, source, message) -> None:
    pa = pytest.importorskip("pyarrow")
    holes = pa.array([*KEYS[:5].tolist(), None], pa.list_(pa.float32(), 4))
    wide = vectors(pa, KEYS, pa.float64())
    columns = {"id": range(6), "a": vectors(pa, KEYS), "b": vectors(pa, KEYS), "wide": wide}
    save_table(pa, pa.table({**columns, "holes": holes}), "file.arrow")
    for name in ("text.arrow", "text.parquet"):
        (folder / name).write_text("hello, this is no table")
    if source == "file.arrow":
        save_table(pa, pa.table(columns), "file.arrow")
    with pytest.raises(InputError, match=message):
        read_vectors(source)


def test_a_missing_table_is_an_os_error(folder) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(FileNotFoundError, match=r"none\.arrow"):
        read_vectors("none.arrow")


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (0, 3)])
def test_found_tables_hold_a_row_for_each_query(folder, shape) -> None:
    pa = pytest.importorskip("pyarrow")
    ids = np.arange(np.prod(shape), dtype=np.int64).reshape(shape)
    write_found(folder / "found.arrow", ids, ids.astype(np.float32))
    with pa.ipc.open_file("found.arrow") as file:
        table = file.read_all()
    assert table.column_names == ["head", "query", "ids", "scores"]
    rows = [row.as_py() for row in table.column("ids")]
    assert rows == ids.reshape(-1, 3).tolist()
    heads = 1 if len(shape) == 2 else shape[0]
    expected = [h for h in range(heads) for _ in range(shape[-2])]
    assert table.column("head").to_pylist() == expected
    assert table.column("query").to_pylist() == [*range(shape[-2])] * heads
    np.testing.assert_array_equal(read_vectors("found.arrow:scores"), ids.reshape(-1, 3))
