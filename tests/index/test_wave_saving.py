"""Saving an index: all or nothing, whatever fails, and over what is open."""

import os
import stat
import zlib
from pathlib import Path

import pytest

from wavekv.index import WaveIndex

from .index_cases import SMALL, assert_same_result, assert_same_tensors, make_data, snapshot

DATA = make_data(0, 90, dim=4, num_queries=4)


def build(num_keys: int = 90) -> WaveIndex:
    return WaveIndex.build(DATA.keys[:, :num_keys], SMALL, values=DATA.values[:, :num_keys])


class Failure(Exception):
    """Not an error that anyone would catch by chance."""


@pytest.mark.parametrize(
    ("module", "name", "nth"),
    [
        (os, "replace", 0),
        (os, "fsync", 0),
        (Path, "open", 0),
        *((zlib, "crc32", n) for n in (0, 5)),
    ],
)
@pytest.mark.parametrize("error", [OSError, Failure, KeyboardInterrupt])
def test_after_a_failure_the_old_file_is_still_there(
    tmp_path, monkeypatch, module, name, nth, error
) -> None:
    path = tmp_path / "index"
    build(70).save(path)
    before = path.read_bytes()
    real, calls = getattr(module, name), []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) > nth:
            raise error("no space left")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail)
        with pytest.raises(error):
            build().save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["index"]
    assert len(WaveIndex.load(path)) == 70
    build().save(path)
    assert len(WaveIndex.load(path)) == 90


def test_a_failure_leaves_no_file_open(tmp_path, monkeypatch) -> None:
    opened = set(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else set()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("no")))
        for _ in range(3):
            with pytest.raises(OSError, match="no"):
                build().save(tmp_path / "index")
    if opened:
        assert len(os.listdir("/proc/self/fd")) <= len(opened)


def test_saving_over_a_mapped_index_leaves_it_as_it_is(tmp_path) -> None:
    path = tmp_path / "index"
    old = build(70)
    old.save(path)
    mapped = WaveIndex.load(path, mmap=True)
    build().save(path)
    assert_same_tensors(snapshot(mapped), snapshot(old))
    assert_same_result(mapped.search(DATA.queries, 5), old.search(DATA.queries, 5))
    mapped.save(path)
    assert len(WaveIndex.load(path)) == 70


def test_a_mapped_index_outlives_its_file(tmp_path) -> None:
    path = tmp_path / "index"
    build().save(path)
    mapped = WaveIndex.load(path, mmap=True)
    path.unlink()
    assert_same_result(mapped.search(DATA.queries, 5), build().search(DATA.queries, 5))


def test_the_same_index_is_the_same_file(tmp_path) -> None:
    build().save(tmp_path / "a")
    WaveIndex.load(tmp_path / "a").save(tmp_path / "b")
    grown = build(20)
    grown.append(DATA.keys[:, 20:], DATA.values[:, 20:])
    grown.save(tmp_path / "c")
    contents = {path.read_bytes() for path in tmp_path.iterdir()}
    assert len(contents) == 1


def test_where_nothing_can_be_written_that_is_said(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        build().save(tmp_path / "nowhere" / "index")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        build().save(tmp_path / "folder")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_a_saved_file_is_as_readable_as_any(tmp_path) -> None:
    before = os.umask(0o022)
    try:
        build().save(tmp_path / "index")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "index").stat().st_mode) == 0o644


def test_a_path_without_a_folder_is_in_this_one(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    build().save("index")
    assert len(WaveIndex.load("index")) == 90
