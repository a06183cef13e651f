"""What `verify` finds, wherever the context is."""

import pytest
from context_files import SIZES

from wavekv.errors import ContextFormatError
from wavekv.remote.address import store_at
from wavekv.remote.failure import Problem
from wavekv.remote.push import push
from wavekv.remote.verify import verify
from wavekv.saved.manifest import NAME


def test_a_sound_context(base, contexts) -> None:
    push(contexts(1), f"{base}/one")
    told = []
    assert verify(f"{base}/one", progress=lambda *it: told.append(it)) == []
    assert sum(nbytes for nbytes, _ in told) == sum(SIZES.values())
    assert verify(str(contexts(1))) == []


def test_every_problem_is_named(base, contexts) -> None:
    push(contexts(1), f"{base}/one")
    store = store_at(f"{base}/one")
    store.delete("keys/c/0")
    store.write("keys/c/1", [bytes(SIZES["keys/c/1"])])
    store.write("tokens.arrow", [b"abc"])
    store.write("keys/notes", [b"mine"])
    missing, crc, notes, size = verify(f"{base}/one")
    assert missing == Problem("keys/c/0", "file", "present", "missing")
    assert str(crc).startswith("keys/c/1: expected crc32 ")
    assert str(notes) == "keys/notes: expected file absent, got present"
    assert str(size) == "tokens.arrow: expected bytes 2000, got 3"


def test_a_damaged_manifest(base, contexts) -> None:
    push(contexts(1), f"{base}/one")
    store = store_at(f"{base}/one")
    raw = store.read(NAME) or b""
    store.write(NAME, [raw.replace(b'"tiny"', b'"huge"')])
    with pytest.raises(ContextFormatError, match="crc32"):
        verify(f"{base}/one")
