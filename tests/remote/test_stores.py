"""From URLs to stores, and what stores say when they fail."""

import sys

import pytest

from wavekv.errors import ConfigError
from wavekv.remote.address import store_at
from wavekv.remote.failure import RemoteError


@pytest.mark.parametrize("url", ["http://host/one", "sftp://host/one", "simplecache::s3://a/b"])
def test_other_kinds_of_stores_are_refused(url) -> None:
    with pytest.raises(ConfigError, match="expected a path or a URL of s3://, gs://, az://, mem"):
        store_at(url)


@pytest.mark.parametrize("url", ["s3://", "memory:///"])
def test_a_url_names_a_place(url) -> None:
    with pytest.raises(ConfigError, match="a place in the store"):
        store_at(url)


@pytest.mark.parametrize("protocol", ["s3", "gs", "az"])
def test_without_obstore_the_extra_is_named(monkeypatch, protocol) -> None:
    monkeypatch.setitem(sys.modules, "obstore.exceptions", None)
    with pytest.raises(ConfigError, match=r"pip install 'wavekv\[remote\]'"):
        store_at(f"{protocol}://bucket/one")


def test_the_registry_of_fsspec_is_left_alone(s3_bucket) -> None:
    from fsspec.registry import registry

    before = dict(registry)
    store_at(f"{s3_bucket}/one").sizes()
    assert dict(registry) == before


def test_a_bucket_that_is_not_there(s3_bucket) -> None:
    store = store_at("s3://nowhere-at-all/one")
    with pytest.raises(RemoteError, match=r"expected to reach s3://nowhere-at-all/one/a, got .*"):
        store.write("a", [b"x"])


def test_a_failure_of_the_server_is_told_in_a_line(s3_bucket) -> None:
    with pytest.raises(RemoteError, match="NoSuchBucket") as caught:
        store_at("s3://nowhere-at-all/one").sizes()
    assert "\n" not in str(caught.value)
    assert "Debug" not in str(caught.value)


def test_failures_of_a_store_are_ours(memory, monkeypatch) -> None:
    store = store_at(f"{memory}/one")
    store.write("a", [b"x"])

    def refuse(*_args, **_options):
        raise PermissionError("no")

    for method in ("cat_file", "find", "ls", "open", "rm_file"):
        monkeypatch.setattr(store._fs, method, refuse)
    for call in (
        lambda: store.read("a"),
        lambda: list(store.chunks("a", 1)),
        lambda: store.sizes(),
        lambda: store.folders(),
        lambda: store.write("a", [b"y"]),
        lambda: store.delete("a"),
    ):
        with pytest.raises(RemoteError, match="got PermissionError: no; check the URL, the cred"):
            call()


def test_objects_of_every_kind_of_store(base) -> None:
    store = store_at(f"{base}/one")
    assert (store.sizes(), store.folders(), store.read("a/b")) == ({}, [], None)
    store.write("a/b", [b"12", b"345"])
    store.write("c", [b""])
    assert store.sizes() == {"a/b": 5, "c": 0}
    assert (store.read("a/b"), store.read("c"), store.folders()) == (b"12345", b"", ["a"])
    assert b"".join(store.chunks("a/b", 5)) == b"12345"
    assert store.below("a").sizes() == {"b": 5}
    store.delete("c")
    store.delete("c")
    assert store.sizes() == {"a/b": 5}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path) -> None:
    store = store_at(tmp_path / "one")
    store.write("a", [b"old"])

    def chunks():
        yield b"n"
        raise RemoteError("broke off")

    with pytest.raises(RemoteError, match="broke off"):
        store.write("a", chunks())
    assert (store.read("a"), store.sizes()) == (b"old", {"a": 3})
