"""Copying contexts from stores of each kind."""

import json
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from context_files import SIZES, fail_after, make_context, tree

from wavekv.errors import ContextFormatError, LockedError
from wavekv.remote.address import store_at
from wavekv.remote.failure import DamagedError, RemoteError
from wavekv.remote.pull import pull
from wavekv.remote.push import push
from wavekv.remote.store import Store
from wavekv.saved.lock import locked
from wavekv.saved.manifest import NAME


@pytest.fixture
def pushed(base, contexts) -> str:
    push(contexts(1), f"{base}/one")
    return f"{base}/one"


@pytest.fixture
def there(tmp_path):
    """Where contexts are pulled to."""
    (tmp_path / "there").mkdir()
    return tmp_path / "there" / "context"


def test_a_pulled_context_is_the_same_files(pushed, contexts, there) -> None:
    told = []
    copied = pull(pushed, there, progress=lambda nbytes, total: told.append((nbytes, total)))
    assert (copied.files, copied.kept) == (len(SIZES), 0)
    assert tree(there) == tree(contexts(1))
    assert sum(nbytes for nbytes, _ in told) == copied.nbytes == sum(SIZES.values())
    assert [path.name for path in there.parent.iterdir() if path.suffix != ".lock"] == ["context"]


def test_an_interrupted_pull_fetches_only_the_rest(pushed, contexts, there, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        fail_after(patch, "chunks", 3)
        with pytest.raises(RemoteError, match="the network is gone"):
            pull(pushed, there, jobs=1)
    assert not there.exists()
    left, whole = tree(there.parent / ".context.pull"), tree(contexts(1))
    kept = [name for name in left if left[name] == whole[name]]
    assert len(kept) == 3
    fetched = count_fetches(monkeypatch, pushed)
    copied = pull(pushed, there)
    assert sorted(fetched) == sorted(set(SIZES) - set(kept))
    assert (copied.files, copied.kept) == (len(SIZES) - 3, 3)
    assert tree(there) == tree(contexts(1))
    assert not (there.parent / ".context.pull").exists()


def count_fetches(monkeypatch, url: str) -> list[str]:
    """The names of the files that are read from a place from now on."""
    fetched = []
    original = Store.chunks

    def chunks(self, name, nbytes):
        if self.url == url.removeprefix("file://"):
            fetched.append(name)
        return original(self, name, nbytes)

    monkeypatch.setattr(Store, "chunks", chunks)
    return fetched


@pytest.mark.parametrize("content", [b"", b"x" * 5001, b"x" * 9000])
def test_what_is_left_damaged_is_fetched_again(pushed, contexts, there, content) -> None:
    gathered = there.parent / ".context.pull"
    make_context(gathered, 1)
    (gathered / "keys/c/0").write_bytes((gathered / "keys/c/0").read_bytes() + content)
    (gathered / "tokens.arrow").write_bytes(content)
    assert pull(pushed, there).files == (2 if content else 1)
    assert tree(there) == tree(contexts(1))


def test_what_another_pull_left_is_not_taken(pushed, base, contexts, there, monkeypatch) -> None:
    push(contexts(2), f"{base}/two")
    gathered = there.parent / ".context.pull"
    with monkeypatch.context() as patch:
        patch.setattr("wavekv.remote.pull.swap", stop)
        with pytest.raises(RemoteError, match="stopped"):
            pull(f"{base}/two", there)
    (gathered / "more").write_bytes(b"foreign")
    assert pull(pushed, there).kept == 1  # the empty one
    assert tree(there) == tree(contexts(1))


def stop(*_: object) -> None:
    raise RemoteError("stopped")


def test_links_in_what_is_left_are_not_followed(pushed, contexts, there, tmp_path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "zarr.json").write_bytes(b"mine")
    gathered = there.parent / ".context.pull"
    gathered.mkdir()
    (gathered / "keys").symlink_to(outside)
    (gathered / "zarr.json").symlink_to(outside / "zarr.json")
    pull(pushed, there)
    assert tree(outside) == {"zarr.json": b"mine"}
    assert tree(there) == tree(contexts(1))


@pytest.mark.parametrize("name", [name for name, size in SIZES.items() if size])
def test_a_corrupted_object_is_found(base, contexts, there, name) -> None:
    push(contexts(1), f"{base}/one")
    store = store_at(f"{base}/one")
    content = bytearray(store.read(name) or b"")
    content[0] ^= 1
    store.write(name, [bytes(content)])
    with pytest.raises(DamagedError, match=f"got {name} with crc32") as caught:
        pull(f"{base}/one", there)
    assert caught.value.problem.file == name
    assert not there.exists()


@pytest.mark.parametrize("content", [b"x", b"x" * 9000])
def test_an_object_of_another_size_is_found(pushed, there, content) -> None:
    store_at(pushed).write("keys/c/0", [content])
    with pytest.raises(DamagedError, match=f"keys/c/0 with bytes {len(content)} instead of 5001"):
        pull(pushed, there)
    assert list(there.parent.iterdir()) == []


def test_a_missing_object_is_found(pushed, there) -> None:
    store_at(pushed).delete("keys/c/1")
    with pytest.raises(DamagedError, match="keys/c/1 with file missing instead of present"):
        pull(pushed, there)
    assert list(there.parent.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/outside", "keys/../../outside", "a//b", "./a", "a\\..\\b", NAME]
)
def test_a_manifest_that_leads_outside_is_refused(base, there, name) -> None:
    store = store_at(f"{base}/one")
    store.write(NAME, [manifest_of(name)])
    with pytest.raises(ContextFormatError, match=r"expected .* to name files inside the context"):
        pull(f"{base}/one", there)
    assert list(there.parent.iterdir()) == []


def manifest_of(name: str) -> bytes:
    """A manifest that is sound but for the name in it."""
    body = {
        "format": "wavekv-context",
        "format_version": 1,
        "wavekv_version": "0",
        "description": {},
        "files": {name: {"bytes": 0, "crc32": "00000000"}},
    }
    content = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    return json.dumps({**body, "crc32": f"{zlib.crc32(content):08x}"}).encode()


def test_a_context_is_replaced_only_when_asked(pushed, contexts, there) -> None:
    push(contexts(2), str(there))
    with pytest.raises(RemoteError, match=r"expected nothing at .*--replace"):
        pull(pushed, there)
    assert tree(there) == tree(contexts(2))
    pull(pushed, there, replace=True)
    assert tree(there) == tree(contexts(1))


def test_a_failed_pull_leaves_the_context_that_it_was_to_replace(pushed, contexts, there) -> None:
    push(contexts(2), str(there))
    store_at(pushed).write("keys/c/1", [bytes(SIZES["keys/c/1"])])
    with pytest.raises(DamagedError):
        pull(pushed, there, replace=True)
    assert tree(there) == tree(contexts(2))


def test_what_is_no_context_is_never_replaced(memory, contexts, there) -> None:
    push(contexts(1), f"{memory}/one")
    there.mkdir()
    (there / "mine").write_bytes(b"mine")
    with pytest.raises(ContextFormatError, match=f"no {NAME} there"):
        pull(f"{memory}/one", there, replace=True)
    assert tree(there) == {"mine": b"mine"}


def test_where_there_is_no_context(base, contexts, there, monkeypatch) -> None:
    place = base.removeprefix("file://")
    with pytest.raises(ContextFormatError, match=f"at {place}/one, got no {NAME}"):
        pull(f"{base}/one", there)
    with monkeypatch.context() as patch:
        fail_after(patch, "write", 2)
        with pytest.raises(RemoteError):
            push(contexts(1), f"{base}/one", jobs=1)
    with pytest.raises(ContextFormatError, match="got an unfinished push or rm of one; run that"):
        pull(f"{base}/one", there)
    assert list(there.parent.iterdir()) == []


def test_the_folder_around_has_to_be_there(memory, contexts, tmp_path) -> None:
    push(contexts(1), f"{memory}/one")
    with pytest.raises(RemoteError, match="to be a folder, got none; make it first"):
        pull(f"{memory}/one", tmp_path / "no" / "context")
    assert not (tmp_path / "no").exists()


def test_eight_pulls_at_once(pushed, contexts, there) -> None:
    paths = [there.with_name(f"context-{number}") for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: pull(pushed, path, jobs=3), paths))
    for path in paths:
        assert tree(path) == tree(contexts(1))


def test_one_pull_at_a_time_to_a_path(memory, contexts, there) -> None:
    push(contexts(1), f"{memory}/one")
    with locked(there), pytest.raises(LockedError):
        pull(f"{memory}/one", there)
    pull(f"{memory}/one", there)
