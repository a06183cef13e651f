"""Whatever happens to a file of a context is said, with the file and what is wrong."""

import json
import os
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from saved_cases import Content, example, read_all

from wavekv.errors import ContextFormatError
from wavekv.saved.manifest import NAME, FileEntry, Manifest
from wavekv.saved.reader import ContextReader
from wavekv.saved.tables import to_arrow

FILES = sorted(
    {
        "zarr.json", "types/zarr.json", "types/bool/c/0/0", "types/int64/zarr.json", "seed/c/0",
        "empty/zarr.json", "pages/0/zarr.json", "pages/0/c/0/0", "pages/0/c/2/0",
        "pages/1/c/0/0/0/0", "tables/numbers.arrow", "tables/none.arrow", "tables/pages_0.arrow",
        "tables/pages_2.arrow",
    }
)  # fmt: skip
# until somebody asks for all: pages, and what stands for other readers
NOT_READ = {"pages/0/c/0/0", "pages/0/c/2/0", "pages/1/c/0/0/0/0", "zarr.json", "types/zarr.json"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "context"
    manifest = example().save(path)
    assert set(FILES) <= set(manifest.files)
    return path


@pytest.fixture
def context(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "context"))


def verify(path: Path) -> list[str]:
    with ContextReader.open(path) as reader:
        return reader.verify()


def sign(path: Path, *names: str) -> None:
    """Give the manifest the sizes and checksums of these files as they are now."""
    manifest = Manifest.parse((path / NAME).read_bytes(), str(path))
    for name in names:
        data = (path / name).read_bytes()
        manifest.files[name] = FileEntry(len(data), zlib.crc32(data))
    (path / NAME).write_bytes(manifest.to_bytes())


def test_the_copy_is_sound(context: Path) -> None:
    assert verify(context) == []


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_named(context: Path, name: str) -> None:
    file, rng = context / name, random.Random(name)
    whole = file.read_bytes()
    for _ in range(5):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        (problem,) = verify(context)
        assert str(file) in problem
        assert "crc32=" in problem
        if name not in NOT_READ:
            with pytest.raises(ContextFormatError, match=f"{file} of crc32="):
                read_all(context)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [-1, 1])
def test_another_size_is_seen_at_once(context: Path, name: str, change: int) -> None:
    file = context / name
    size = file.stat().st_size
    os.truncate(file, size + change)
    with pytest.raises(ContextFormatError, match=f"{file} of bytes={size} .* got {size + change}"):
        ContextReader.open(context)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_seen_at_once(context: Path, name: str) -> None:
    (context / name).unlink()
    with pytest.raises(ContextFormatError, match=f"{context / name} .*No such file"):
        ContextReader.open(context)


def replaced_by_link(file: Path) -> None:
    file.rename(file.with_name("moved"))
    file.symlink_to("moved")


def replaced_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def replaced_by_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("replace", [replaced_by_link, replaced_by_folder, replaced_by_pipe])
def test_what_is_no_file_is_not_opened(
    context: Path, name: str, replace: Callable[[Path], None]
) -> None:
    replace(context / name)
    with pytest.raises(ContextFormatError, match=str(context / name)):
        ContextReader.open(context)


def test_a_linked_folder_is_not_entered(context: Path) -> None:
    (context / "pages").rename(context.parent / "elsewhere")
    (context / "pages").symlink_to(context.parent / "elsewhere")
    with pytest.raises(ContextFormatError, match=f"{context}/pages/"):
        ContextReader.open(context)


def test_damage_after_opening_is_found_when_it_is_read(context: Path) -> None:
    with ContextReader.open(context) as reader:
        os.truncate(context / "seed/c/0", 0)
        with pytest.raises(ContextFormatError, match="seed/c/0 of bytes=8"):
            reader.array("seed")
        (context / "pages/0/c/2/0").unlink()
        pages = reader.pages("pages/0")
        for call in (pages.map, pages.open):
            with pytest.raises(ContextFormatError, match="pages/0/c/2/0"):
                call()
        problems = reader.verify()
    assert [name for name in FILES if any(name in problem for problem in problems)] == [
        "pages/0/c/2/0",
        "seed/c/0",
    ]


def test_foreign_things_are_named(context: Path) -> None:
    (context / "notes.txt").touch()
    (context / "pages/0/c/9").mkdir()
    (context / "pages/0/c/9/0").touch()
    (context / "link").symlink_to("zarr.json")
    problems = verify(context)
    assert len(problems) == 4
    for found in ("a file notes.txt", "a folder pages/0/c/9", "a file pages/0/c/9/0"):
        assert any(problem.endswith(f"got {found}") for problem in problems)
    assert any("a symbolic link link" in problem for problem in problems)


def test_a_manifest_that_became_a_link_is_named(context: Path) -> None:
    with ContextReader.open(context) as reader:
        (context / NAME).rename(context.parent / NAME)
        (context / NAME).symlink_to(context.parent / NAME)
        (problem,) = reader.verify()
    assert problem.endswith("got a symbolic link manifest.json")


def test_files_that_took_each_others_place_are_named(context: Path) -> None:
    first, second = context / "pages/0/c/0/0", context / "pages/0/c/1/0"
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    assert len(verify(context)) == 2


METADATA_CHANGES = {
    "data_type": "float64",
    "shape": [3, 6],
    "zarr_format": 2,
    "node_type": "group",
    "fill_value": 1,
    "codecs": [{"name": "gzip"}],
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [3, 4]}},
    "chunk_key_encoding": {"name": "v2"},
    "attributes": {"dtype": "object"},
    "storage_transformers": [],
}


@pytest.mark.parametrize("key", METADATA_CHANGES)
def test_metadata_of_another_form_is_refused(context: Path, key: str) -> None:
    name = "types/float32/zarr.json"
    body = json.loads((context / name).read_bytes())
    (context / name).write_text(json.dumps({**body, key: METADATA_CHANGES[key]}))
    sign(context, name)
    with ContextReader.open(context) as reader:
        with pytest.raises(ContextFormatError, match="types/float32"):
            reader.array("types/float32")
        assert any("types/float32" in problem for problem in reader.verify())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"shape": [true]}', "[" * 100_000])
def test_metadata_that_is_none_is_refused(context: Path, text: str) -> None:
    (context / "seed/zarr.json").write_text(text)
    sign(context, "seed/zarr.json")
    with (
        ContextReader.open(context) as reader,
        pytest.raises(ContextFormatError, match=r"seed/zarr\.json with"),
    ):
        reader.array("seed")


def test_a_shape_of_very_many_files_is_refused_at_once(context: Path) -> None:
    body = json.loads((context / "pages/0/zarr.json").read_bytes())
    body["shape"][0] = 1 << 60
    (context / "pages/0/zarr.json").write_text(json.dumps(body))
    sign(context, "pages/0/zarr.json")
    with (
        ContextReader.open(context) as reader,
        pytest.raises(ContextFormatError, match=r"expected \d+ files of"),
    ):
        reader.pages("pages/0")


def test_a_shape_of_larger_files_is_refused(context: Path) -> None:
    name = "types/float32/zarr.json"
    body = json.loads((context / name).read_bytes())
    body["shape"] = body["chunk_grid"]["configuration"]["chunk_shape"] = [3, 6]
    (context / name).write_text(json.dumps(body))
    sign(context, name)
    with (
        ContextReader.open(context) as reader,
        pytest.raises(ContextFormatError, match=r"float32/c/0/0 of bytes=72 .* got 60"),
    ):
        reader.array("types/float32")


def test_booleans_are_0_and_1(context: Path) -> None:
    (context / "types/bool/c/0/0").write_bytes(bytes([2] * 15))
    sign(context, "types/bool/c/0/0")
    with (
        ContextReader.open(context) as reader,
        pytest.raises(ContextFormatError, match="types/bool"),
    ):
        reader.array("types/bool")


def test_checksums_of_other_pages_are_named(context: Path) -> None:
    wrong = torch.zeros(700, dtype=torch.int64)
    table = "tables/pages_0.arrow"
    (context / table).write_bytes(to_arrow({"crc32": wrong}, table))
    sign(context, table)
    problems = verify(context)
    assert len(problems) == 3
    assert all("pages/0/c/" in problem and "column crc32" in problem for problem in problems)
    (context / table).write_bytes(to_arrow({"crc32": wrong[1:]}, table))
    sign(context, table)
    (problem,) = verify(context)
    assert "column crc32 [700]" in problem


def arrow_file(array: pyarrow.Array, metadata: dict | None = None, **options) -> bytes:
    schema = pyarrow.schema([pyarrow.field("c", array.type, metadata=metadata)])
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_file(sink, schema, options=pyarrow.ipc.IpcWriteOptions(**options)) as file:
        for _ in range(2 if metadata and "twice" in metadata else 1):
            file.write_batch(pyarrow.record_batch([array], schema=schema))
    return sink.getvalue().to_pybytes()


numbers = pyarrow.array(np.arange(1000, dtype=np.int64))
pairs = pyarrow.FixedSizeListArray.from_arrays(numbers, 2)
ARROW_FILES = {
    "no file": b"ARROW1 or not",
    "empty": b"",
    "compressed": arrow_file(numbers, compression="lz4"),
    "two batches": arrow_file(numbers, {"twice": ""}),
    "nulls": arrow_file(pyarrow.array([1, None, 3])),
    "nulls in lists": arrow_file(
        pyarrow.FixedSizeListArray.from_arrays(pyarrow.array([1, None]), 2), {"shape": "[2]"}
    ),
    "text": arrow_file(pyarrow.array(["a"])),
    "a type": arrow_file(pyarrow.array(np.ones(3))),
    "a type for another": arrow_file(numbers, {"dtype": "bfloat16"}),
    "an unknown type": arrow_file(numbers, {"dtype": "object"}),
    "lists without a shape": arrow_file(pairs),
    "another shape": arrow_file(pairs, {"shape": "[3]"}),
    "a shape of no lists": arrow_file(numbers, {"shape": "[2]"}),
    "no shape": arrow_file(pairs, {"shape": "{}"}),
    "half a shape": arrow_file(pairs, {"shape": "["}),
    "bytes as booleans": arrow_file(pyarrow.array(np.full(3, 2, np.uint8)), {"dtype": "bool"}),
    "bits as booleans": arrow_file(pyarrow.array([True, False])),
}


@pytest.mark.parametrize("data", ARROW_FILES.values(), ids=ARROW_FILES)
def test_tables_of_another_form_are_refused(context: Path, data: bytes) -> None:
    name = "tables/numbers.arrow"
    (context / name).write_bytes(data)
    sign(context, name)
    with ContextReader.open(context) as reader:
        with pytest.raises(ContextFormatError, match=r"numbers\.arrow"):
            reader.table("numbers")
        assert any(name in problem for problem in reader.verify())


def test_compression_is_told(context: Path) -> None:
    (context / "tables/numbers.arrow").write_bytes(ARROW_FILES["compressed"])
    sign(context, "tables/numbers.arrow")
    with (
        ContextReader.open(context) as reader,
        pytest.raises(ContextFormatError, match="got compressed or unaligned numbers in column c"),
    ):
        reader.table("numbers")


def test_what_is_no_context_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="got nothing there"):
        ContextReader.open(tmp_path / "nothing")
    with pytest.raises(ContextFormatError, match="without it"):
        ContextReader.open(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ContextFormatError, match="got a file"):
        ContextReader.open(tmp_path / "file")
    Content().save(tmp_path / "context")
    (tmp_path / "context" / NAME).rename(tmp_path / "moved")
    (tmp_path / "context" / NAME).symlink_to(tmp_path / "moved")
    with pytest.raises(ContextFormatError, match="got a symbolic link"):
        ContextReader.open(tmp_path / "context")
