"""Deleting contexts, and nothing else."""

from pathlib import Path

import pytest
from context_files import SIZES, at_place, fail_after, make_context

from wavekv.errors import ContextFormatError, LockedError
from wavekv.remote.address import store_at
from wavekv.remote.failure import RemoteError
from wavekv.remote.push import push
from wavekv.remote.remove import remove
from wavekv.saved.lock import locked


def test_a_removed_context_leaves_nothing(base, contexts) -> None:
    push(contexts(1), f"{base}/one")
    push(contexts(2), f"{base}/two")
    removed = remove(f"{base}/one")
    assert (removed.files, removed.nbytes, removed.foreign) == (len(SIZES), sum(SIZES.values()), [])
    assert store_at(f"{base}/one").sizes() == {}
    assert store_at(base).folders() == ["two"]


def test_the_manifest_goes_first(memory, contexts, monkeypatch) -> None:
    push(contexts(1), f"{memory}/one")
    with monkeypatch.context() as patch:
        fail_after(patch, "delete", 1)
        with pytest.raises(RemoteError):
            remove(f"{memory}/one")
    with pytest.raises(ContextFormatError, match="unfinished"):
        store_at_contexts(f"{memory}/one")
    assert set(SIZES) <= set(store_at(f"{memory}/one").sizes())


def store_at_contexts(url: str) -> None:
    from wavekv.remote.published import expect_published

    expect_published(store_at(url))


def test_what_is_no_part_of_it_stays(base, contexts) -> None:
    push(contexts(1), f"{base}/one")
    store_at(f"{base}/one").write("keys/notes", [b"mine"])
    assert remove(f"{base}/one").foreign == ["keys/notes"]
    assert at_place(store_at(f"{base}/one")) == {"keys/notes": b"mine"}


def test_what_is_no_context_stays(base) -> None:
    store_at(f"{base}/one").write("keys/c/0", [b"mine"])
    for url in (f"{base}/one", f"{base}/nowhere"):
        with pytest.raises(ContextFormatError, match="expected a saved context"):
            remove(url)
    assert at_place(store_at(base)) == {"one/keys/c/0": b"mine"}


def test_no_folder_is_made_to_remove_from(tmp_path) -> None:
    with pytest.raises(ContextFormatError):
        remove(str(tmp_path / "no" / "where"))
    assert list(tmp_path.iterdir()) == []


def test_parts_of_an_interrupted_push_go_too(tmp_path) -> None:
    make_context(tmp_path / "one", 1)
    (tmp_path / "one/keys/.zarr.json.part").write_bytes(b"half")
    remove(str(tmp_path / "one"))
    assert not (tmp_path / "one").exists()


def test_a_context_that_is_being_written_is_locked(tmp_path: Path) -> None:
    make_context(tmp_path / "one", 1)
    with locked(tmp_path / "one"), pytest.raises(LockedError):
        remove(str(tmp_path / "one"))
    assert (tmp_path / "one/zarr.json").exists()
