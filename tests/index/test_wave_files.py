"""Saved indexes: what comes back is what was saved, or an error that says what is wrong."""

import struct
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import wavekv
from wavekv.errors import IndexFormatError
from wavekv.index import IndexParams, WaveIndex

from .index_cases import (
    FEW,
    PARAMS,
    SEEDS,
    SMALL,
    assert_same_result,
    assert_same_tensors,
    make_data,
    snapshot,
)

DATA = make_data(0, 90, dim=4, num_queries=4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "index"
    WaveIndex.build(DATA.keys, SMALL, values=DATA.values).save(path)
    return path


def answers(index: WaveIndex) -> list:
    return [
        index.search(DATA.queries, 5, budget=0.3),
        index.search(DATA.queries, 5, budget=1.0),
        index.search(DATA.queries, 5, top_p=0.5, group=2),
        index.attend(DATA.queries, budget=0.1),
    ]


@FEW
@given(
    num_keys=st.sampled_from([0, 1, 63, 64, 200]),
    params=PARAMS,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    has_values=st.booleans(),
    has_sample=st.booleans(),
    is_flat=st.booleans(),
    seed=SEEDS,
)
def test_what_was_saved_is_loaded(
    tmp_path_factory, num_keys, params, dtype, has_values, has_sample, is_flat, seed
) -> None:
    keys, values, queries = make_data(seed, num_keys, heads=1 if is_flat else 2, dtype=dtype)
    if is_flat:
        keys, values, queries = keys[0], values[0], queries[0]
    index = WaveIndex.build(
        keys,
        params,
        values=values if has_values else None,
        query_sample=queries if has_sample else None,
    )
    path = tmp_path_factory.mktemp("files") / "index"
    index.save(path)
    for options in ({}, {"mmap": True}, {"verify": False}, {"mmap": True, "verify": False}):
        with WaveIndex.load(path, **options) as loaded:
            assert_same_tensors(snapshot(loaded), snapshot(index))
            assert loaded.stats() == index.stats()
            assert_same_result(loaded.search(queries, 5), index.search(queries, 5))
            if has_values:
                assert_same_result(loaded.attend(queries), index.attend(queries))
    loaded = WaveIndex.load(path)
    for changed in (loaded, index):
        changed.append(keys, values if has_values else None)
        changed.truncate(num_keys + num_keys // 2)
    assert_same_tensors(snapshot(loaded), snapshot(index))


@given(at=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255), mmap=st.booleans())
def test_a_changed_byte_is_found_or_does_not_matter(
    saved, tmp_path_factory, at, value, mmap
) -> None:
    raw = bytearray(saved.read_bytes())
    raw[int(at * len(raw))] ^= value
    path = tmp_path_factory.mktemp("flipped") / "index"
    path.write_bytes(raw)
    assert_found_or_the_same(path, saved, mmap)


@given(position=st.integers(0, 40), value=st.integers(1, 255), mmap=st.booleans())
def test_a_changed_byte_of_the_preamble(saved, tmp_path_factory, position, value, mmap) -> None:
    raw = bytearray(saved.read_bytes())
    raw[position] ^= value
    path = tmp_path_factory.mktemp("flipped") / "index"
    path.write_bytes(raw)
    assert_found_or_the_same(path, saved, mmap)
    if position < 32:
        with pytest.raises(IndexFormatError):
            WaveIndex.describe(path)


def assert_found_or_the_same(path: Path, saved: Path, mmap: bool) -> None:
    try:
        index = WaveIndex.load(path, mmap=mmap)
    except IndexFormatError:
        with pytest.raises(IndexFormatError, match=f"expected {path} .*, got"):
            WaveIndex.load(path, mmap=not mmap)
        return
    for got, wanted in zip(answers(index), answers(WaveIndex.load(saved)), strict=True):
        assert_same_result(got, wanted)


@given(keep=st.floats(0, 1, exclude_max=True), extra=st.integers(0, 3), mmap=st.booleans())
def test_a_file_that_was_cut_or_has_grown_is_refused(
    saved, tmp_path_factory, keep, extra, mmap
) -> None:
    raw = saved.read_bytes()
    raw = raw + bytes(extra) if extra else raw[: int(keep * len(raw))]
    path = tmp_path_factory.mktemp("cut") / "index"
    path.write_bytes(raw)
    for verify in (True, False):
        with pytest.raises(IndexFormatError, match=r"expected .*, got "):
            WaveIndex.load(path, mmap=mmap, verify=verify)


def with_header(raw: bytes, change) -> bytes:
    """A file whose header was changed, checksum and all."""
    magic, version, at, length, _ = struct.unpack_from("<8sIQQI", raw)
    text = change(raw[at : at + length])
    preamble = struct.pack("<8sIQQI", magic, version, at, len(text), zlib.crc32(text))
    return preamble + raw[len(preamble) : at] + text


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b'"ntotal": 90', b'"ntotal": 91'),
        lambda text: text.replace(b'"ntotal": 90', b'"ntotal": "90"'),
        lambda text: text.replace(b'"ntotal": 90', b'"ntotal": -90'),
        lambda text: text.replace(b'"dim": 4', b'"dim": 5'),
        lambda text: text.replace(b'"dim": 4', b'"dim": -4'),
        lambda text: text.replace(b'"num_heads": 2', b'"num_heads": 4'),
        lambda text: text.replace(b'"page_size": 4', b'"page_size": 5'),
        lambda text: text.replace(b'"page_size": 4', b'"page_size": 256'),
        lambda text: text.replace(b'"has_values": true', b'"has_values": false'),
        lambda text: text.replace(b'"dtype": "float32"', b'"dtype": "float64"'),
        lambda text: text.replace(b'"nbytes": ', b'"nbytes": 1'),
        lambda text: text.replace(b'"offset": ', b'"offset": 9'),
        lambda text: text.replace(b'"params"', b'"parameters"'),
        lambda text: b"{}",
        lambda text: b"[]",
        lambda text: b"3",
        lambda text: b"not json",
        lambda text: b"\xff\xfe",
    ],
)
@pytest.mark.parametrize("mmap", [False, True])
def test_a_header_that_does_not_fit_itself_is_refused(saved, tmp_path, change, mmap) -> None:
    raw = saved.read_bytes()
    (tmp_path / "index").write_bytes(with_header(raw, change))
    with pytest.raises(IndexFormatError, match=r"expected .*, got "):
        WaveIndex.load(tmp_path / "index", mmap=mmap)


@pytest.mark.parametrize("version", [3, 7])
def test_another_format_says_so(saved, tmp_path, version: int) -> None:
    raw = bytearray(saved.read_bytes())
    raw[8:12] = struct.pack("<I", version)
    (tmp_path / "index").write_bytes(raw)
    message = (
        rf"expected .*index in format version 4, got {version}; the wavekv that wrote it reads"
    )
    for read in (WaveIndex.load, WaveIndex.describe):
        with pytest.raises(IndexFormatError, match=message):
            read(tmp_path / "index")


@pytest.mark.parametrize("content", [b"", b"WAVEKVIX", b"PK\3\4" + bytes(9000), b"x" * 31])
def test_what_is_no_index_is_refused(tmp_path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    for read in (WaveIndex.load, WaveIndex.describe):
        with pytest.raises(IndexFormatError, match=r"expected .* to be a wavekv index.*, got b'"):
            read(tmp_path / "file")
        with pytest.raises(IsADirectoryError):
            read(tmp_path)
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "nothing")


def test_a_description_needs_no_parts(saved) -> None:
    header = WaveIndex.describe(saved)
    assert header["wavekv"] == wavekv.__version__
    assert IndexParams(**header["params"]) == SMALL
    shape = [header[name] for name in ("num_heads", "ntotal", "dim")]
    assert shape == [2, 90, 4]
    assert header["dtype"] == "float32"
    assert header["has_values"]
    assert not header["has_query_sample"]
    assert not header["is_flat"]
    assert WaveIndex.describe(str(saved)) == header
