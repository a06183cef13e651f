"""What `checked` lets through."""

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavekv.remote.checksum import checked
from wavekv.remote.failure import DamagedError
from wavekv.saved.manifest import FileEntry

chunk_lists = st.lists(st.binary(max_size=5), max_size=6)


def entry_of(content: bytes) -> FileEntry:
    return FileEntry(len(content), zlib.crc32(content))


def drain(stream, came: bytearray) -> None:
    for chunk in stream:
        came += chunk


@given(chunk_lists)
def test_sound_bytes_pass(chunks) -> None:
    content = b"".join(chunks)
    assert b"".join(checked(chunks, entry_of(content), "a", "here")) == content


@given(chunk_lists, st.binary(max_size=20))
def test_of_other_bytes_less_than_the_whole_passes(chunks, expected) -> None:
    content = b"".join(chunks)
    if content == expected:
        return
    stream = checked(chunks, entry_of(expected), "a", "here")
    came = bytearray()
    with pytest.raises(DamagedError) as caught:
        drain(stream, came)
    assert len(came) < max(1, len(expected))
    assert caught.value.problem.file == "a"
    assert caught.value.problem.field == ("bytes" if len(content) != len(expected) else "crc32")


def test_the_error_says_what_and_where() -> None:
    with pytest.raises(
        DamagedError, match=r"here .* got a with bytes 3 or more instead of 2; take another"
    ):
        list(checked([b"a", b"bc"], FileEntry(2, 0), "a", "here"))
    with pytest.raises(DamagedError, match="crc32 9e83486d instead of 00000000"):
        list(checked([b"ab"], FileEntry(2, 0), "a", "here"))
