"""Copying contexts to stores of each kind."""

from pathlib import Path

import pytest
from context_files import SIZES, at_place, count_writes, fail_after, make_context, tree

from wavekv.errors import ConfigError, ContextFormatError, LockedError
from wavekv.remote.address import store_at
from wavekv.remote.failure import DamagedError, RemoteError
from wavekv.remote.published import MARKER, published
from wavekv.remote.pull import pull
from wavekv.remote.push import push
from wavekv.remote.verify import verify
from wavekv.saved.lock import locked
from wavekv.saved.manifest import NAME

TOTAL = sum(SIZES.values())


def test_a_pushed_context_is_the_same_files(base, contexts) -> None:
    url = f"{base}/one"
    told = []
    copied = push(contexts(1), url, progress=lambda nbytes, total: told.append((nbytes, total)))
    assert (copied.files, copied.nbytes, copied.kept) == (len(SIZES), TOTAL, 0)
    assert at_place(store_at(url)) == tree(contexts(1))
    assert sum(nbytes for nbytes, _ in told) == TOTAL
    assert {total for _, total in told} == {TOTAL}


def test_a_second_push_sends_nothing(base, contexts, monkeypatch) -> None:
    push(contexts(1), f"{base}/one")
    written = count_writes(monkeypatch)
    assert push(contexts(1), f"{base}/one").kept == len(SIZES)
    assert written == []


@pytest.mark.parametrize("replaced", [False, True])
def test_an_interrupted_push_sends_only_the_rest(base, contexts, monkeypatch, replaced) -> None:
    url = f"{base}/one"
    if replaced:
        push(contexts(2), url)
    with monkeypatch.context() as patch:
        # the marker, two files; before the new marker goes that of the old context
        fail_after(patch, "write", 4 if replaced else 3)
        with pytest.raises(RemoteError, match="the network is gone"):
            push(contexts(1), url, jobs=1, replace=replaced)
    assert published(store_at(url)) is None
    written = count_writes(monkeypatch)
    copied = push(contexts(1), url)
    assert (len(written), copied.files, copied.kept) == (len(SIZES) - 2, len(SIZES) - 2, 2)
    assert at_place(store_at(url)) == tree(contexts(1))


def test_a_file_that_broke_off_is_sent_again(base, contexts, monkeypatch) -> None:
    url = f"{base}/one"
    with monkeypatch.context() as patch:
        cut_chunks(patch, "keys/c/0", 2)
        with pytest.raises(RemoteError, match="broke off"):
            push(contexts(1), url)
    assert store_at(url).sizes().get("keys/c/0", 0) < SIZES["keys/c/0"]
    push(contexts(1), url)
    assert at_place(store_at(url)) == tree(contexts(1))


def cut_chunks(monkeypatch, broken: str, after: int) -> None:
    from wavekv.remote.store import Store

    original = Store.chunks

    def chunks(self, name, nbytes):
        for number, chunk in enumerate(original(self, name, nbytes)):
            if name == broken and number == after:
                raise RemoteError(f"{name} broke off")
            yield chunk

    monkeypatch.setattr(Store, "chunks", chunks)


@pytest.mark.parametrize("name", ["keys/c/0", "zarr.json", "keys/c/1"])
def test_a_damaged_file_stops_the_push(base, contexts, name) -> None:
    file = contexts(1) / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedError, match=rf"context-1 .* got {name} with crc32"):
        push(contexts(1), f"{base}/one")
    store = store_at(f"{base}/one")
    assert published(store) is None
    assert store.sizes().get(name, 0) < SIZES[name]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda file: file.unlink(), "keys/c/0 with file missing instead of present"),
        (lambda file: file.write_bytes(b"x"), "keys/c/0 with bytes 1 instead of 5001"),
    ],
)
def test_a_file_of_another_size_stops_the_push_before_it_begins(
    memory, contexts, damage, told
) -> None:
    damage(contexts(1) / "keys/c/0")
    with pytest.raises(DamagedError, match=told):
        push(contexts(1), f"{memory}/one")
    assert store_at(f"{memory}/one").sizes() == {}


def test_another_context_is_replaced_only_when_asked(base, contexts) -> None:
    url = f"{base}/one"
    push(contexts(1), url)
    with pytest.raises(RemoteError, match=r"got another context; .*--replace"):
        push(contexts(2), url)
    assert at_place(store_at(url)) == tree(contexts(1))
    push(contexts(2), url, replace=True)
    assert at_place(store_at(url)) == tree(contexts(2))


def test_files_of_the_replaced_context_alone_go(base, contexts, tmp_path) -> None:
    url = f"{base}/one"
    push(contexts(1), url)
    store_at(url).write("notes.txt", [b"mine"])
    make_context(tmp_path / "small", 3, {"tokens.arrow": 10, "notes.txt": 4})
    push(tmp_path / "small", url, replace=True)
    assert at_place(store_at(url)) == tree(tmp_path / "small")
    assert verify(url) == []


def test_an_unfinished_push_of_another_context_is_replaced_only_when_asked(
    base, contexts, monkeypatch
) -> None:
    url = f"{base}/one"
    with monkeypatch.context() as patch:
        fail_after(patch, "write", 3)
        with pytest.raises(RemoteError):
            push(contexts(1), url, jobs=1)
    with pytest.raises(RemoteError, match="another context"):
        push(contexts(2), url)
    push(contexts(2), url, replace=True)
    assert at_place(store_at(url)) == tree(contexts(2))


@pytest.mark.parametrize("replace", [False, True])
def test_what_is_no_context_is_never_replaced(base, contexts, replace) -> None:
    store_at(base).write("zarr.json", [b"{}"])
    with pytest.raises(RemoteError, match=r"got zarr\.json and no saved context"):
        push(contexts(1), base, replace=replace)
    assert at_place(store_at(base)) == {"zarr.json": b"{}"}


@pytest.mark.parametrize("replace", [False, True])
def test_the_manifest_of_something_else_is_never_replaced(memory, contexts, replace) -> None:
    store_at(f"{memory}/one").write(NAME, [b'{"name": "an app"}'])
    with pytest.raises(ContextFormatError, match="of a saved context"):
        push(contexts(1), f"{memory}/one", replace=replace)
    assert at_place(store_at(f"{memory}/one")) == {NAME: b'{"name": "an app"}'}


def test_a_missing_object_is_put_again(base, contexts, monkeypatch) -> None:
    url = f"{base}/one"
    push(contexts(1), url)
    store_at(url).delete("keys/c/1")
    written = count_writes(monkeypatch)
    push(contexts(1), url)
    assert written == ["keys/c/1"]
    assert at_place(store_at(url)) == tree(contexts(1))


def test_a_left_marker_is_removed(memory, contexts) -> None:
    url = f"{memory}/one"
    push(contexts(1), url)
    store_at(url).write(MARKER, [(contexts(1) / NAME).read_bytes()])
    assert verify(url) == []
    push(contexts(1), url)
    assert at_place(store_at(url)) == tree(contexts(1))


def test_large_files_go_in_parts(s3_bucket, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("wavekv.remote.store.CHUNK", 3 << 20)
    make_context(tmp_path / "large", 0, {"big": (25 << 20) + 7})
    push(tmp_path / "large", f"{s3_bucket}/large")
    assert verify(f"{s3_bucket}/large") == []
    pull(f"{s3_bucket}/large", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(tmp_path / "large")


def test_a_folder_that_another_writes_to_is_locked(tmp_path, contexts) -> None:
    place = tmp_path / "store" / "one"
    place.parent.mkdir()
    with locked(place), pytest.raises(LockedError):
        push(contexts(1), str(place))
    push(contexts(1), str(place))


def test_what_is_no_context_is_not_pushed(memory, tmp_path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ContextFormatError, match=f"no {NAME} there"):
            push(path, f"{memory}/one")


def test_jobs_are_checked_before_anything_is_written(memory, contexts) -> None:
    with pytest.raises(ConfigError, match="jobs must be 1 or more, got 0"):
        push(contexts(1), f"{memory}/one", jobs=0)
    assert store_at(f"{memory}/one").sizes() == {}


def test_a_path_relative_to_the_working_directory(tmp_path, contexts, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    push(Path(contexts(1).name), "relative/one")
    assert tree(tmp_path / "relative/one") == tree(contexts(1))
