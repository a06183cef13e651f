"""Places for contexts, of each kind: in memory, in a folder, and in a bucket of a server that
speaks S3 over HTTP."""

from __future__ import annotations

import itertools
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from context_files import CHUNK, make_context
from fsspec.implementations.memory import MemoryFileSystem

from wavekv.remote import store as store_module

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A server on a free port."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new bucket, with what it takes to reach it in the environment."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{next(_numbers)}"
    urllib.request.urlopen(
        urllib.request.Request(f"{s3_endpoint}/{name}", method="PUT"), timeout=30
    ).close()
    return f"s3://{name}"


@pytest.fixture
def memory() -> Iterator[str]:
    """A place in memory that nothing else uses."""
    yield f"memory://place-{next(_numbers)}"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(params=["memory", "folder", "file_url", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place of each kind that has nothing in it."""
    if request.param == "folder":
        return str(tmp_path / "store")
    if request.param == "file_url":
        return f"file://{tmp_path}/store"
    fixture: str = request.getfixturevalue("memory" if request.param == "memory" else "s3_bucket")
    return fixture


@pytest.fixture
def contexts(tmp_path: Path) -> Callable[[int], Path]:
    """Saved contexts by number."""

    def context(seed: int) -> Path:
        path = tmp_path / f"context-{seed}"
        if not path.exists():
            make_context(path, seed)
        return path

    return context


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "CHUNK", CHUNK)
